"""Which replica answers, and why it is that one."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.schema import Floor
from config.variant import QualityMeasures, Variant
from gateway.routing.breaker import HEALTHY, failed
from gateway.routing.catalog import Target
from gateway.routing.ladder import Scene, worth_waiting
from gateway.routing.ladder import ranked as ranking
from gateway.routing.shedding import ROOMY, refused
from serving.replica import Replica, ReplicaStatus, State

HI = Variant("hi", "bf16", QualityMeasures("parent", 0.0, 1.0, 1.0))
MID = Variant("mid", "int8", QualityMeasures("measured", 0.01, 0.97, 1.01))
LO = Variant("lo", "int4", QualityMeasures("measured", 0.05, 0.92, 1.05))
ODD = Variant("odd", "fp8", QualityMeasures("unknown"))
RUNGS = (HI, MID, LO)
NO_FLOOR = Floor()
NOBODY: frozenset[str] = frozenset()


def target(*rungs: Variant, floor: Floor = NO_FLOOR, pinned: bool = False) -> Target:
    """What a name stands for."""
    return Target("smol", rungs, floor, pinned)


def status(name: str, state: State = State.READY, in_flight: int = 0) -> ReplicaStatus:
    """A replica, named variant-number."""
    replica = Replica(name, name.partition("-")[0], "any", f"http://{name}", "m1")
    return ReplicaStatus(replica, state, "", 0.0, in_flight)


def scene(snapshot: Iterable[ReplicaStatus]) -> Scene:
    """What a decision is made on when this is what there is."""
    ready: dict[str, tuple[Replica, ...]] = {}
    for each in snapshot:
        if each.state is State.READY:
            ready[each.replica.variant] = (*ready.get(each.replica.variant, ()), each.replica)
    return Scene(ready, {each.replica.id: each.in_flight for each in snapshot})


def ranked(*snapshot: ReplicaStatus, tried: frozenset[str] = NOBODY, turn: int = 0) -> list[str]:
    """The order in which replicas are tried."""
    return [choice.replica.id for choice in ranking(target(*RUNGS), RUNGS, scene(snapshot), tried, turn, 0.0)]


@pytest.mark.parametrize(
    "snapshot, tried, order",
    [
        ([], NOBODY, []),
        ([status("lo-1"), status("hi-1"), status("mid-1")], NOBODY, ["hi-1", "mid-1", "lo-1"]),
        ([status("hi-1", in_flight=9), status("lo-1")], NOBODY, ["hi-1", "lo-1"]),
        ([status("hi-1", in_flight=2), status("hi-2", in_flight=1)], NOBODY, ["hi-2", "hi-1"]),
        ([status("hi-1"), status("hi-2"), status("lo-1")], frozenset({"hi-1"}), ["hi-2", "lo-1"]),
        ([status("odd-1"), status("lo-1")], NOBODY, ["lo-1"]),
        *(([status("hi-1", state), status("lo-1")], NOBODY, ["lo-1"]) for state in State if state is not State.READY),
    ],
)
def test_the_order_of_replicas(snapshot: list[ReplicaStatus], tried: frozenset[str], order: list[str]) -> None:
    """The highest rung comes first, there the least loaded replica; only ready ones that have not failed before."""
    assert ranked(*snapshot, tried=tried) == order


def test_equals_take_turns() -> None:
    """Replicas with the same load get the same share, whatever their number; a less loaded one goes first."""
    equal = [status(f"hi-{number}") for number in range(3)]
    assert Counter(ranked(*equal, turn=turn)[0] for turn in range(30)) == {"hi-0": 10, "hi-1": 10, "hi-2": 10}
    assert {ranked(status("hi-0", in_flight=1), *equal[1:], turn=turn)[-1] for turn in range(9)} == {"hi-0"}


names = st.builds("{}-{}".format, st.sampled_from(["hi", "mid", "lo", "odd"]), st.integers(0, 9))
replicas = st.builds(status, names, st.sampled_from(State), st.integers(0, 3))


@given(st.lists(replicas, max_size=8), st.integers(0, 20))
def test_a_ranking_is_complete_and_ordered(several: list[ReplicaStatus], turn: int) -> None:
    """Every ready replica of a rung is ranked once, never a higher rung behind a lower, never more load before less."""
    order = [rung.name for rung in RUNGS]
    several = list({each.replica.id: each for each in several}.values())
    choices = list(ranking(target(*RUNGS), RUNGS, scene(several), NOBODY, turn, 0.0))
    wanted = [each for each in several if each.state is State.READY and each.replica.variant in order]
    assert Counter(choice.replica.variant for choice in choices) == Counter(each.replica.variant for each in wanted)
    places = [order.index(choice.variant.name) for choice in choices]
    assert places == sorted(places)
    for name in order:
        loads = sorted(each.in_flight for each in wanted if each.replica.variant == name)
        assert len(loads) == places.count(order.index(name))


@pytest.mark.parametrize(
    "rungs, kept, pinned, reasons",
    [
        (RUNGS, RUNGS, False, ["preferred", "fallback", "fallback"]),
        (RUNGS, (MID, LO), False, ["floor", "fallback"]),
        (RUNGS, (HI, LO), False, ["preferred", "fallback"]),
        ((LO,), (LO,), True, ["pinned"]),
        ((LO,), (LO,), False, ["preferred"]),
    ],
)
def test_reasons(rungs: tuple[Variant, ...], kept: tuple[Variant, ...], pinned: bool, reasons: list[str]) -> None:
    """The best rung that may answer is preferred, or due to a floor; lower ones are fallbacks; named ones pinned."""
    snapshot = [status(f"{variant.name}-1") for variant in RUNGS]
    choices = ranking(target(*rungs, pinned=pinned), kept, scene(snapshot), NOBODY, 0, 0.0)
    assert [choice.reason for choice in choices] == reasons


def test_a_failing_replica_is_the_last_resort() -> None:
    """One that its breaker bars comes behind every rung; a variant of one replica is barred to no request at all."""
    opened = HEALTHY
    for _ in range(3):
        opened = failed(opened, 0.0)
    snapshot = [status("hi-1"), status("hi-2"), status("lo-1")]
    held = replace(scene(snapshot), breakers={"hi-1": opened})
    assert [each.replica.id for each in ranking(target(*RUNGS), RUNGS, held, NOBODY, 0, 0.5)] == ["hi-2", "lo-1"]
    both = replace(scene(snapshot), breakers={"hi-1": opened, "hi-2": failed(opened, 0.1)})
    order = [each.replica.id for each in ranking(target(*RUNGS), RUNGS, both, NOBODY, 0, 0.5)]
    assert order == ["lo-1", "hi-1"]


def test_a_replica_without_room_is_not_chosen() -> None:
    """One that said so, and one with as many requests as it may have."""
    snapshot = [status("hi-1"), status("hi-2", in_flight=512), status("lo-1")]
    full = replace(scene(snapshot), marks={"hi-1": refused(ROOMY, 0.0)})
    assert [each.replica.id for each in ranking(target(*RUNGS), RUNGS, full, NOBODY, 0, 0.1)] == ["lo-1"]
    assert [each.replica.id for each in ranking(target(*RUNGS), RUNGS, full, NOBODY, 0, 9.0)] == ["hi-1", "lo-1"]


@pytest.mark.parametrize("state", State)
def test_what_is_worth_waiting_for(state: State) -> None:
    """A replica that is starting or warming up, of a variant that may answer."""
    hopeful = state in (State.STARTING, State.WARMING)
    assert worth_waiting(RUNGS, [status("lo-1", state)]) is hopeful
    assert not worth_waiting((HI,), [status("lo-1", state)])
