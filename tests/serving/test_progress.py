"""How long starts usually take, and what is told of them."""

from pathlib import Path

import pytest

from serving.progress import progress_lines
from serving.replica import Replica, ReplicaStatus, State
from serving.start_times import STARTS_PER_VARIANT, StartTimes
from tests.serving.supervised import launch


def test_usual_time_is_the_median_of_the_latest_starts(tmp_path: Path) -> None:
    """One slow start, with a cold disk say, does not change the estimate; old ones are forgotten."""
    times, given = StartTimes(tmp_path / "starts.json"), launch(tmp_path)
    assert times.usual_seconds(given) is None
    for seconds in (900, 40, 42, 41, 43, 44):
        times.add(given, seconds)
    assert times.usual_seconds(given) == 42
    for _ in range(STARTS_PER_VARIANT):
        times.add(given, 10)
    assert times.usual_seconds(given) == 10
    assert times.usual_seconds(launch(tmp_path, "bf16")) is None


@pytest.mark.parametrize("content", ["", "[]", '{"cpu x": "soon"}', '{"cpu x": [null]}', "\x00"])
def test_a_broken_file_is_no_estimate(tmp_path: Path, content: str) -> None:
    """What can't be read is replaced by the next start."""
    file = tmp_path / "starts.json"
    file.write_text(content)
    times, given = StartTimes(file), launch(tmp_path)
    assert times.usual_seconds(given) is None
    times.add(given, 5)
    assert times.usual_seconds(given) == 5


def test_a_file_that_cannot_be_written_fails_no_start(tmp_path: Path) -> None:
    """Without a place for it, starts go on without an estimate."""
    times, given = StartTimes(tmp_path / "missing" / "starts.json"), launch(tmp_path)
    times.add(given, 5)
    StartTimes().add(given, 5)
    assert times.usual_seconds(given) is None


def status(name: str, state: State, reason: str = "") -> ReplicaStatus:
    """A replica in a state."""
    return ReplicaStatus(Replica(name, name, "int4", f"http://{name}", name), state, reason, 0.0, 0)


def test_only_changes_are_told() -> None:
    """A replica that is as it was is not told of again; failures are left to the error that is logged."""
    before = [status("a", State.STARTING, "loading"), status("b", State.READY), status("c", State.STARTING, "loading")]
    now = [status("a", State.READY), status("b", State.READY), status("c", State.FAILED, "no kernel")]
    assert progress_lines({each.replica.id: each for each in before}, now) == [
        "a: ready at http://a (2 of 3 are ready)"
    ]
    assert progress_lines({each.replica.id: each for each in now}, now) == []
    assert progress_lines({}, before[:1]) == ["a: starting, loading"]
