"""From what runs to what is wanted: each step as a row, and properties of the whole way."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.schema import ReplicaSettings
from config.variant import PARENT_QUALITY, Variant
from serving.identity import launch_digest, slot_of, successor_id
from serving.replica import Launch
from serving.rolling import Current, Replace, Retire, Start, Step, next_step


def wanted(slot: str, gpus: tuple[int, ...] = (), port: int | None = None, sequences: int = 1) -> Launch:
    """A launch; another number of sequences makes it another one."""
    name = slot.rpartition("-")[0]
    variant = Variant(name, "int4", PARENT_QUALITY, Path("/models") / name)
    return Launch(slot, variant, "cuda", ReplicaSettings(variant=name, max_num_seqs=sequences), gpus, port)


def current(launch: Launch, *, ready: bool = True, in_flight: int = 0) -> Current:
    """One that runs."""
    return Current(launch, ready, in_flight)


OLD, NEW = wanted("a-1"), wanted("a-1", sequences=2)


@pytest.mark.parametrize(
    "running,requirements,step",
    [
        ([], [OLD], Start(OLD)),
        ([current(OLD)], [OLD], None),
        ([current(OLD)], [], Retire("a-1")),
        ([current(OLD)], [NEW], Replace("a-1", NEW, surge=True)),
        # It runs as its own successor already.
        ([current(replace(OLD, replica_id="a-1b"))], [OLD], None),
        ([current(replace(OLD, replica_id="a-1b"))], [NEW], Replace("a-1b", NEW, surge=True)),
        # New before gone: another variant gets ready before the old one leaves.
        ([current(OLD)], [wanted("b-1")], Start(wanted("b-1"))),
        # Its GPU is taken: no room for two.
        (
            [current(wanted("a-1", (0,)))],
            [wanted("a-1", (0,), sequences=2)],
            Replace("a-1", wanted("a-1", (0,), sequences=2), surge=False),
        ),
        # A free GPU: room for two.
        ([current(wanted("a-1", (0,)))], [wanted("a-1", (1,))], Replace("a-1", wanted("a-1", (1,)), surge=True)),
        # A pinned port is taken.
        (
            [current(wanted("a-1", port=8101))],
            [wanted("a-1", port=8101, sequences=2)],
            Replace("a-1", wanted("a-1", port=8101, sequences=2), surge=False),
        ),
        # The GPU of one that nobody wants: it goes first.
        ([current(wanted("a-1", (0,)))], [wanted("b-1", (0,))], Retire("a-1")),
        # Trading places: one has to go before any can come.
        (
            [current(wanted("a-1", (0,))), current(wanted("b-1", (1,)))],
            [wanted("a-1", (1,)), wanted("b-1", (0,))],
            Retire("a-1"),
        ),
    ],
)
def test_step(running: list[Current], requirements: list[Launch], step: Step | None) -> None:
    """What is new gets ready first wherever there is room."""
    assert next_step(running, requirements) == step


@pytest.mark.parametrize("surge", [True, False])
def test_least_loaded_goes_first(surge: bool) -> None:
    """Of several, one that answers nobody is replaced first, then the one with the fewest requests."""
    gpus = [() if surge else (number,) for number in range(3)]
    old = [wanted(f"a-{number}", gpus[number]) for number in range(3)]
    new = [replace(launch, settings=ReplicaSettings(variant="a", max_num_seqs=9)) for launch in old]
    loads = [current(old[0], in_flight=2), current(old[1], in_flight=1), current(old[2], ready=False, in_flight=7)]
    step = next_step(loads, new)
    assert step == Replace("a-2", new[2], surge=surge)
    assert next_step(loads[:2], new[:2]) == Replace("a-1", new[1], surge=surge)


FLEETS = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(0, 2), st.integers(1, 3)), unique_by=lambda row: row[:2], max_size=6
)


def fleet(rows: list[tuple[str, int, int]]) -> list[Launch]:
    """Launches whose GPUs are their own."""
    return [wanted(f"{name}-{number}", (place,), sequences=n) for place, (name, number, n) in enumerate(rows)]


@given(FLEETS, FLEETS)
def test_every_way_ends_where_it_should(before: list[tuple[str, int, int]], after: list[tuple[str, int, int]]) -> None:
    """From any fleet to any other in finitely many steps; never do two replicas hold one GPU."""
    running = {launch.replica_id: launch for launch in fleet(before)}
    target = fleet(after)
    for _ in range(40):
        step = next_step([current(launch) for launch in running.values()], target)
        if step is None:
            break
        take(step, running)
        gpus = [gpu for launch in running.values() for gpu in launch.gpus]
        assert len(gpus) == len(set(gpus))
    assert {slot_of(name): launch_digest(launch) for name, launch in running.items()} == {
        launch.replica_id: launch_digest(launch) for launch in target
    }


def take(step: Step, running: dict[str, Launch]) -> None:
    """Do what a supervisor does."""
    match step:
        case Start(launch):
            running[launch.replica_id] = launch
        case Retire(replica_id):
            del running[replica_id]
        case Replace(replica_id, launch, surge):
            name = successor_id(replica_id) if surge else replica_id
            if surge:
                running[name] = replace(launch, replica_id=name)
                del running[replica_id]
            else:
                running[replica_id] = replace(launch, replica_id=replica_id)


def test_names_alternate() -> None:
    """A replacement needs another name, and there are never more than two."""
    assert successor_id("a-1") == "a-1b"
    assert successor_id("a-1b") == "a-1"
    assert slot_of("a-1b") == slot_of("a-1") == "a-1"


@pytest.mark.parametrize(
    "changed",
    [
        {"settings": ReplicaSettings(variant="a", max_num_seqs=2)},
        {"gpus": (1,)},
        {"media_domains": ("images.example.com",)},
        {"port": 8102},
        {"engine": "cpu"},
        {"variant": Variant("a", "int4", PARENT_QUALITY, Path("/models/other"))},
        {"settings": ReplicaSettings.model_validate({"variant": "a", "max_num_seqs": 1, "api_key": "s3cret"})},
    ],
)
def test_what_makes_a_launch_another_one(changed: dict[str, object]) -> None:
    """Whatever the server is started with is in its digest."""
    assert launch_digest(replace(OLD, **changed)) != launch_digest(OLD)  # type: ignore[arg-type]


@pytest.mark.parametrize("setting", ["drain_seconds", "start_timeout_seconds", "hang_seconds"])
def test_patience_makes_no_other_launch(setting: str) -> None:
    """What only says how long we wait restarts nothing; nor does the name it runs under, nor how many there are."""
    patient = ReplicaSettings.model_validate({"variant": "a", "max_num_seqs": 1, setting: 77, "count": 3})
    assert launch_digest(replace(OLD, settings=patient, replica_id="a-1b")) == launch_digest(OLD)
