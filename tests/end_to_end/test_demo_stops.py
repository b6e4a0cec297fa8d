"""The demo stops, and leaves nothing: not when it serves, and not in the middle of its work."""

import signal
from pathlib import Path

import pytest

from tests.end_to_end.conftest import PORTS
from tests.end_to_end.running_demo import Running, alive, noted_sessions, processes_of, start, until

pytestmark = [pytest.mark.real_vllm, pytest.mark.timeout(2700)]


def test_stop_leaves_nothing(serving: Running, home: Path) -> None:
    """Ctrl-C ends the demo with code 0, and every process of every replica."""
    sessions = noted_sessions(home)
    assert len(sessions) == 3
    assert len(alive(sessions)) >= 9
    assert serving.stop(signal.SIGINT) == 0
    assert alive(sessions) == []
    assert noted_sessions(home) == {}


@pytest.mark.parametrize("stage", ["base model ...", "layers", "loading, process"])
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_leaves_nothing(
    first_run: Running, home: Path, tmp_path: Path, stage: str, sent: signal.Signals
) -> None:
    """Ctrl-C while the base is unpacked, while it is quantized, while replicas start: nothing half-made, no process.

    Whole layers wait for the next run, in a folder of their own.
    """
    place = tmp_path / "home"
    (place / "models").mkdir(parents=True)
    if stage != "base model ...":
        (place / "models" / "SmolLM2-135M-Instruct").symlink_to(home / "models" / "SmolLM2-135M-Instruct")
    if stage == "loading, process":
        (place / "variants").symlink_to(home / "variants")
    made = set(place.rglob("*"))
    running = start(tmp_path / "run", place, "demo", *PORTS)
    until(lambda: stage in running.told, 300, running)
    assert running.stop(sent) == 130
    assert processes_of(place) == []
    left = {path.relative_to(place).parts[0] for path in set(place.rglob("*")) - made}
    kept = {"logs", "running", "bytecode", "vllm", "variants", "demo.yaml", "supervisor.lock"}
    kept |= {"supervisor.id", "seals"}
    assert {name for name in left if not name.startswith("state.db")} <= kept
    assert list((place / "models").glob(".*")) == []
    assert stage == "loading, process" or list((place / "variants").glob("[!.]*")) == []
    assert [path.name for path in (place / "variants").glob(".*") if path.suffix != ".solving"] == []
