"""Which replica answers, and why it is that one."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.schema import NO_FLOOR, Spill
from config.variant import QualityMeasures, Variant
from gateway.routing.breaker import HEALTHY, Breaker, failed
from gateway.routing.target import Target
from gateway.routing.cluster_state import NOBODY, ClusterState, Query
from gateway.routing.latency import LatencyEstimate
from gateway.routing.overload import NOT_OVERLOADED, Overload, refused
from gateway.routing.pick import Decision, decide, has_room, long_enough, worth_waiting
from gateway.routing.request import Ask, needed_tokens
from gateway.routing.sessions import Placement
from gateway.routing.spill import SpillGate
from serving.replica import Replica, ReplicaStatus, State

HI = Variant("hi", "bf16", QualityMeasures("parent", 0.0, 1.0, 1.0))
MID = Variant("mid", "int8", QualityMeasures("measured", 0.01, 0.97, 1.01))
LO = Variant("lo", "int4", QualityMeasures("measured", 0.05, 0.92, 1.05))
RUNGS = (HI, MID, LO)
SPILL = Spill(after_seconds=2.0, return_below_seconds=0.5, dwell_seconds=10)
TARGET = Target("smol", RUNGS, NO_FLOOR, pinned=False, spill=SPILL)
SPILLING = {("smol", "hi"): SpillGate(spilling=True)}
LONG = Query(Ask(prompt_tokens=100))


def promised(name: str, wait: float | None = 0.0, *, requests: float = 0.0, **changes: Any) -> LatencyEstimate:
    """What a replica, named variant-number, can promise; a wait of None: its speed is unknown."""
    replica = Replica(name, name.partition("-")[0], "any", f"http://{name}", "m1")
    known, wait = wait is not None, wait or 0.0
    told = LatencyEstimate(
        replica, name, True, known, known, False, int(requests), requests, queue_seconds=wait, wait_seconds=wait
    )
    costs = {"fixed_seconds": wait, "token_seconds": 0.001, "answer_seconds": 0.02}
    return msgspec.structs.replace(told, **{**costs, **changes})


def scene(*outlooks: LatencyEstimate, **held: Any) -> ClusterState:
    """What a decision is made on when this is what there is."""
    by_variant: dict[str, list[LatencyEstimate]] = {}
    for each in outlooks:
        by_variant.setdefault(each.replica.variant, []).append(each)
    return ClusterState(lambda name: by_variant.get(name, ()), **held)


def decided(
    *outlooks: LatencyEstimate,
    query: Query = LONG,
    rungs: tuple[Variant, ...] = RUNGS,
    target: Target = TARGET,
    now: float = 100.0,
    **held: Any,
) -> Decision:
    """What comes of it."""
    return decide(target, rungs, query, scene(*outlooks, **held), now)


def chosen(*outlooks: LatencyEstimate, **given: Any) -> str | None:
    """Who answers, and why: `hi-1 preferred`."""
    offer = decided(*outlooks, **given).offer
    return None if offer is None else f"{offer.choice.replica.id} {offer.choice.reason}"


@pytest.mark.parametrize(
    "outlooks, expected",
    [
        ([], None),
        ([promised("lo-1"), promised("hi-1"), promised("mid-1")], "hi-1 preferred"),
        ([promised("hi-1", 2.0), promised("lo-1")], "hi-1 preferred"),
        ([promised("hi-1", 2.1), promised("mid-1"), promised("lo-1")], "mid-1 spill"),
        ([promised("hi-1", 2.1), promised("mid-1", 2.1), promised("lo-1")], "lo-1 spill"),
        ([promised("hi-1", 9.0), promised("hi-2", 1.9), promised("lo-1")], "hi-2 preferred"),
        # Nobody is soon enough: the fastest, which may be the best.
        ([promised("hi-1", 9.0), promised("mid-1", 7.0), promised("lo-1", 8.0)], "mid-1 spill"),
        ([promised("hi-1", 7.0), promised("mid-1", 9.0), promised("lo-1", 8.0)], "hi-1 preferred"),
        ([promised("mid-1"), promised("lo-1")], "mid-1 fallback"),
        ([promised("hi-1", has_room=False), promised("lo-1")], "lo-1 spill"),
        # Nobody measured it: as long as it has room, it answers.
        ([promised("hi-1", None, requests=50), promised("lo-1")], "hi-1 preferred"),
        ([promised("hi-1", 5.0), promised("mid-1", None)], "mid-1 spill"),
    ],
)
def test_the_ladder(outlooks: Sequence[LatencyEstimate], expected: str | None) -> None:
    """The highest rung that is soon enough; on a lower one because of load it is a spill, else a fallback."""
    assert chosen(*outlooks) == expected


@pytest.mark.parametrize(
    "rungs, kept, pinned, reason",
    [
        (RUNGS, RUNGS, False, "hi-1 preferred"),
        (RUNGS, (MID, LO), False, "mid-1 floor"),
        (RUNGS, (HI, LO), False, "hi-1 preferred"),
        ((LO,), (LO,), True, "lo-1 pinned"),
        ((LO,), (LO,), False, "lo-1 preferred"),
    ],
)
def test_reasons(rungs: tuple[Variant, ...], kept: tuple[Variant, ...], pinned: bool, reason: str) -> None:
    """The best rung that may answer is preferred, or due to a floor; named ones are pinned."""
    everybody = [promised(f"{variant.name}-1") for variant in RUNGS]
    assert chosen(*everybody, rungs=kept, target=Target("smol", rungs, NO_FLOOR, pinned)) == reason


# Within a rung


@pytest.mark.parametrize(
    "query, expected",
    [
        (LONG, "hi-2"),
        # Reading is what differs: a long prompt goes to who reads faster, or has read it already.
        (Query(Ask(prompt_tokens=2000)), "hi-1"),
        (Query(Ask(prompt_tokens=2000), cached_tokens={"hi-2": 1900.0}), "hi-2"),
        (Query(Ask(prompt_tokens=100), tried=frozenset({"hi-2"})), "hi-1"),
    ],
)
def test_the_cheapest_replica(query: Query, expected: str) -> None:
    """Waiting, reading and what is cached, weighed in seconds."""
    replicas = promised("hi-1", 0.5, token_seconds=0.001), promised("hi-2", 0.3, token_seconds=0.002)
    assert chosen(*replicas, query=query) == f"{expected} preferred"


def test_equals_take_turns() -> None:
    """Replicas with the same load get the same share, whatever their number."""
    equal = [promised(f"hi-{number}") for number in range(3)]
    turns = Counter(chosen(*equal, query=Query(turn=turn)) for turn in range(30))
    assert turns == {f"hi-{number} preferred": 10 for number in range(3)}


def test_the_shortest_queue_where_a_speed_is_unknown() -> None:
    """Of one replica is enough: seconds and requests can't be compared."""
    replicas = promised("hi-1", 0.1, requests=5), promised("hi-2", None, requests=3), promised("hi-3", 9.0, requests=4)
    assert chosen(*replicas) == "hi-2 preferred"
    assert {chosen(*replicas, query=Query(turn=turn)) for turn in range(6)} == {"hi-2 preferred"}


def test_a_context_that_is_too_short() -> None:
    """Whoever surely has too short a one is left out, unless they all have: then an engine says so."""
    short, long = promised("hi-1", context_tokens=100.0), promised("lo-1", context_tokens=1000.0)
    asked = Query(Ask(prompt_tokens=200))
    assert chosen(short, long, query=asked) == "lo-1 fallback"
    assert chosen(short, query=asked) == "hi-1 preferred"
    assert chosen(short, msgspec.structs.replace(long, has_room=False), query=asked) is None


# Conversations


@pytest.mark.parametrize(
    "stay, gates, outlooks, expected",
    [
        # Its replica, as long as that is cheap; a second request at the same time is no turn of a conversation.
        (Placement("hi", "hi-2"), {}, [promised("hi-1"), promised("hi-2", 0.05)], "hi-2 preferred"),
        (Placement("hi", "hi-2"), {}, [promised("hi-1"), promised("hi-2", 1.5)], "hi-1 preferred"),
        (Placement("hi", "hi-2", running=1), {}, [promised("hi-1"), promised("hi-2", 0.05)], "hi-1 preferred"),
        # Its variant, while a rung spills; it comes back when nothing spills any more.
        (Placement("mid", "mid-1"), SPILLING, [promised("hi-1", 0.6), promised("mid-1", 1.0)], "mid-1 spill"),
        (Placement("mid", "mid-1"), {}, [promised("hi-1", 0.6), promised("mid-1", 1.0)], "hi-1 preferred"),
        (Placement("mid", "mid-1"), SPILLING, [promised("hi-1", 0.6), promised("mid-1", 3.0)], "hi-1 preferred"),
        (Placement("hi", "hi-1"), SPILLING, [promised("hi-1", 1.99), promised("mid-1")], "hi-1 preferred"),
        (Placement("hi", "hi-1"), SPILLING, [promised("hi-1", 2.01), promised("mid-1")], "mid-1 spill"),
        # What it was on is gone, or not good enough any more.
        (Placement("old", "old-1"), {}, [promised("hi-1"), promised("mid-1")], "hi-1 preferred"),
    ],
)
def test_conversations(
    stay: Placement, gates: Mapping[tuple[str, str], SpillGate], outlooks: Sequence[LatencyEstimate], expected: str
) -> None:
    """A conversation changes replicas when that pays, and variants as rarely as can be."""
    assert chosen(*outlooks, query=Query(Ask(prompt_tokens=100), stay=stay), gates=gates) == expected


# Spilling


def test_a_rung_that_spills_lets_down_a_share() -> None:
    """In proportion to the wait, where the next rung is sooner; all others stay."""
    gates, went = dict(SPILLING), Counter[str | None]()
    for _ in range(100):
        decision = decided(promised("hi-1", 0.875), promised("mid-1"), gates=gates)
        gates.update(decision.gates)
        assert decision.offer is not None
        went[decision.offer.outlook.id] += 1
    assert went == {"hi-1": 75, "mid-1": 25}
    down = {("smol", "hi"): SpillGate(spilling=True, owed=0.99)}
    assert chosen(promised("hi-1", 0.875), promised("mid-1", 1.0), gates=down) == "hi-1 preferred"
    assert chosen(promised("hi-1", 0.875), promised("mid-1", 1.0), promised("lo-1"), gates=down) == "lo-1 spill"


def test_the_gates_that_turn_are_told() -> None:
    """Each rung but the last has one; those that stay as they are aren't mentioned."""
    decision = decided(promised("hi-1", 9.0), promised("mid-1", 5.0), promised("lo-1", 9.0))
    assert {name: gate.spilling for name, gate in decision.gates.items()} == {
        ("smol", "hi"): True,
        ("smol", "mid"): True,
    }
    assert decided(promised("hi-1", 0.1), promised("mid-1", 5.0)).gates == {}
    assert decided(promised("hi-1", has_room=False), promised("lo-1")).gates[("smol", "hi")].spilling
    pinned = Target("lo", (LO,), NO_FLOOR, pinned=True)
    assert decided(promised("lo-1", 99.0), rungs=(LO,), target=pinned).gates == {}


# What is held against replicas


def opened() -> Breaker:
    """A breaker that bars, opened at 0 for a second."""
    held = HEALTHY
    for _ in range(3):
        held = failed(held, 0.0)
    return held


def test_a_failing_replica_is_the_last_resort() -> None:
    """One that its breaker bars comes behind every rung; a variant of one replica is barred to no request at all."""
    everybody = promised("hi-1"), promised("hi-2"), promised("lo-1")
    held = {"hi-1": opened()}
    assert chosen(*everybody, now=0.5, breakers=held) == "hi-2 preferred"
    both = {"hi-1": opened(), "hi-2": failed(opened(), 0.1)}
    assert chosen(*everybody, now=0.5, breakers=both) == "lo-1 fallback"
    assert chosen(*everybody[:2], now=0.5, breakers=both) == "hi-1 preferred"
    tried = Query(tried=frozenset({"lo-1"}))
    assert chosen(*everybody, query=tried, now=0.5, breakers=both) == "hi-1 preferred"


@pytest.mark.parametrize(
    "mark, now, expected",
    [
        (refused(NOT_OVERLOADED, 0.0), 0.1, "lo-1 spill"),
        (refused(NOT_OVERLOADED, 0.0), 9.0, "hi-1 preferred"),
        (Overload(most=3), 9.0, "lo-1 spill"),
        (Overload(most=4), 9.0, "hi-1 preferred"),
    ],
)
def test_a_replica_that_said_it_is_full(mark: Overload, now: float, expected: str) -> None:
    """It is spared for a while, and then gets as many as it took."""
    assert chosen(promised("hi-1", requests=3), promised("lo-1"), now=now, marks={"hi-1": mark}) == expected


def test_who_has_room() -> None:
    """Somebody who may answer, however bad."""
    full = promised("hi-1", has_room=False)
    assert not has_room(TARGET, RUNGS, scene(full), 0.0)
    assert has_room(TARGET, RUNGS, scene(full, promised("lo-1", 99.0)), 0.0)
    assert not has_room(TARGET, (HI, MID), scene(full, promised("lo-1")), 0.0)
    barred = {name: opened() for name in ("hi-1", "hi-2", "hi-3")}
    three = [promised(name) for name in barred]
    assert has_room(TARGET, RUNGS, scene(*three, breakers=barred), 0.5)


# Properties

names = st.builds("{}-{}".format, st.sampled_from(["hi", "mid", "lo", "odd"]), st.integers(0, 3))
outlooks = st.builds(
    promised,
    names,
    st.none() | st.floats(0, 10),
    requests=st.integers(0, 9),
    has_room=st.booleans(),
    context_tokens=st.sampled_from([50.0, 1e6]),
)
fleets = st.lists(outlooks, max_size=8, unique_by=lambda each: each.id)
stays = st.none() | st.builds(Placement, st.sampled_from(["hi", "mid", "lo", "odd"]), names, st.integers(0, 1))
queries = st.builds(
    Query,
    st.builds(Ask, st.floats(0, 1e4), st.none() | st.integers(1, 100)),
    st.integers(0, 9),
    st.frozensets(names, max_size=3),
    stays,
    st.dictionaries(names, st.floats(0, 1e4), max_size=3),
)
gates = st.dictionaries(
    st.sampled_from([("smol", "hi"), ("smol", "mid")]),
    st.builds(SpillGate, st.booleans(), st.floats(0, 100), st.floats(0, 1)),
)
breakers = st.dictionaries(names, st.builds(opened), max_size=4)
marks = st.dictionaries(names, st.builds(Overload, until=st.sampled_from([0.0, 200.0])), max_size=3)


@given(fleets, queries, gates, breakers, marks, st.sets(st.sampled_from(range(3)), min_size=1), st.floats(0, 200))
def test_only_rungs_that_may_answer_do(
    fleet: list[LatencyEstimate],
    query: Query,
    held: dict[tuple[str, str], SpillGate],
    barred: dict[str, Breaker],
    full: dict[str, Overload],
    kept: set[int],
    now: float,
) -> None:
    """Under any load and fault; and somebody answers as long as anybody who may has room."""
    rungs = tuple(RUNGS[place] for place in sorted(kept))
    here = scene(*fleet, gates=held, breakers=barred, marks=full)
    offer = decide(TARGET, rungs, query, here, now).offer
    if offer is not None:
        assert offer.choice.variant in rungs
        assert offer.choice.replica.variant == offer.choice.variant.name
        assert offer.outlook.has_room
        assert offer.outlook.id not in query.tried
        assert offer.outlook in fleet
    elif not query.tried and not query.ask.prompt_tokens and not query.ask.answer_tokens:
        assert not has_room(TARGET, rungs, here, now)


@given(fleets, queries, gates, breakers, marks, st.sets(st.sampled_from(range(3)), min_size=1), st.floats(0, 200))
def test_whose_turn_it_is_is_served(
    fleet: list[LatencyEstimate],
    query: Query,
    held: dict[tuple[str, str], SpillGate],
    barred: dict[str, Breaker],
    full: dict[str, Overload],
    kept: set[int],
    now: float,
) -> None:
    """Where a line hears that there is room, a request finds it, with a context that is long enough."""
    rungs, query = tuple(RUNGS[place] for place in sorted(kept)), msgspec.structs.replace(query, tried=NOBODY)
    here = scene(*fleet, gates=held, breakers=barred, marks=full)
    needed = needed_tokens(query.ask)
    context_tokens = long_enough(rungs, here, needed)
    offer = decide(TARGET, rungs, query, here, now).offer
    assert (offer is not None) == has_room(TARGET, rungs, here, now, context_tokens)
    if offer is not None and context_tokens:
        assert needed <= context_tokens <= offer.outlook.context_tokens


LONG_WAITS = [promised("hi-1", 0.0, context_tokens=100.0), promised("hi-2", 3.0), promised("lo-1")]


@pytest.mark.parametrize(
    "outlooks, query, expected, spilling",
    [
        # It has the prompt in its cache, so that it is cheapest all the same: the rung isn't slow.
        (
            [promised("hi-1", 3.0), promised("hi-2", 0.0), promised("lo-1")],
            Query(Ask(prompt_tokens=10_000), cached_tokens={"hi-1": 10_000.0}),
            "hi-1 preferred",
            None,
        ),
        # One that failed on the quick replica, and one that is too long for it, go down alone.
        (
            [promised("hi-1"), promised("hi-2", 3.0), promised("lo-1")],
            Query(tried=frozenset({"hi-1"})),
            "lo-1 spill",
            None,
        ),
        (LONG_WAITS, Query(Ask(prompt_tokens=1000)), "lo-1 spill", None),
        (LONG_WAITS, Query(), "hi-1 preferred", None),
        ([promised("hi-1", 2.5), promised("hi-2", 3.0), promised("lo-1")], Query(), "lo-1 spill", True),
        # As of now nobody knows how fast it is: whatever it spilled for is over.
        ([promised("hi-1", None), promised("lo-1")], Query(), "hi-1 preferred", None),
    ],
)
def test_what_is_so_for_one_request_alone_turns_no_gate(
    outlooks: Sequence[LatencyEstimate], query: Query, expected: str, spilling: bool | None
) -> None:
    """Where its prompt is cached, whom it has tried, and how long it is."""
    made = decided(*outlooks, query=query)
    assert made.offer is not None
    assert f"{made.offer.choice.replica.id} {made.offer.choice.reason}" == expected
    gate = made.gates.get(("smol", "hi"))
    assert (None if gate is None else gate.spilling) is spilling


def test_a_gate_closes_where_speeds_are_unknown() -> None:
    """It opened when there was no room."""
    made = decided(promised("hi-1", None), promised("lo-1"), gates=SPILLING)
    assert made.gates == {("smol", "hi"): SpillGate(spilling=False, since_seconds=100.0)}


def test_a_crowd_with_one_name_is_no_conversation() -> None:
    """It spills by its share like any other requests, instead of all of it or nothing."""
    gates, stay, went = dict(SPILLING), Placement("hi", "hi-1", 50), Counter[str]()
    for turn in range(99):
        query = Query(LONG.ask, turn, stay=stay)
        made = decided(promised("hi-1", 1.0), promised("lo-1"), query=query, gates=gates)
        gates.update(made.gates)
        assert made.offer is not None
        stay = Placement(made.offer.choice.variant.name, made.offer.choice.replica.id, 50)
        went[stay.variant] += 1
    assert went == {"hi": 66, "lo": 33}


@given(fleets, queries)
def test_a_sooner_answer_is_never_above_the_choice(fleet: list[LatencyEstimate], query: Query) -> None:
    """While nothing spills, no rung above the one that answers would have been soon enough."""
    offer = decided(*fleet, query=query).offer
    if offer is None:
        return
    short = msgspec.structs.replace(query, ask=Ask())
    for rung in RUNGS[: RUNGS.index(offer.choice.variant)]:
        better = decided(*fleet, query=short, rungs=(rung,)).offer
        slow = better is None or better.outlook.wait_seconds > SPILL.after_seconds
        assert slow or query.ask.prompt_tokens or query.ask.answer_tokens


@pytest.mark.parametrize("state", State)
def test_what_is_worth_waiting_for(state: State) -> None:
    """A replica that is starting or warming up, of a variant that may answer."""
    hopeful = state in (State.STARTING, State.WARMING)
    status = ReplicaStatus(replace(promised("lo-1").replica), state, "", 0.0, 0)
    assert worth_waiting(RUNGS, [status]) is hopeful
    assert not worth_waiting((HI,), [status])


def test_the_cost_of_a_decision_is_that_of_its_candidates() -> None:
    """Other aliases' replicas are not even looked at."""
    looked: list[str] = []

    def outlooks_of(variant: str) -> Sequence[LatencyEstimate]:
        looked.append(variant)
        return [promised(f"{variant}-{number}") for number in range(3)]

    decide(TARGET, RUNGS, LONG, ClusterState(outlooks_of), time.monotonic())
    assert looked == ["hi"]
