"""The decision: which replica answers a request, and the reason that its client is given."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.schema import NO_FLOOR
from config.variant import Variant
from gateway.routing.breaker import failed
from gateway.routing.cluster_state import ClusterState
from gateway.routing.latency import LatencyEstimate
from gateway.routing.overload import NOT_OVERLOADED, Overload, refused
from gateway.routing.pick import decide
from gateway.routing.request import NO_REPLICAS, RoutingRequest
from gateway.routing.sessions import Placement
from gateway.routing.spill import PAUSE_SECONDS, SpillGate
from gateway.routing.target import Target
from gateway.routing.waiting import has_room, shortest_fitting_context
from tests.gateway.routing.clusters import (
    HI,
    LO,
    LONG,
    MID,
    NOW,
    RUNGS,
    SPILL,
    SPILLING,
    chosen,
    cluster,
    decision,
    estimate,
    fleets,
    ladders,
    named,
    opened,
    request,
    requests,
    states,
)


def room(wanted: RoutingRequest, state: ClusterState, now: float, needed_tokens: float = 0.0) -> bool:
    """Return whether any replica that may answer a request takes one more."""
    return has_room([rung.name for rung in wanted.rungs], state, now, needed_tokens, wanted.tools)


@pytest.mark.parametrize(
    "estimates, expected",
    [
        ([], None),
        ([estimate("lo-1"), estimate("hi-1"), estimate("mid-1")], "hi-1 preferred"),
        ([estimate("hi-1", 2.0), estimate("lo-1")], "hi-1 preferred"),
        ([estimate("hi-1", 2.1), estimate("mid-1"), estimate("lo-1")], "mid-1 spill"),
        ([estimate("hi-1", 2.1), estimate("mid-1", 2.1), estimate("lo-1")], "lo-1 spill"),
        ([estimate("hi-1", 9.0), estimate("hi-2", 1.9), estimate("lo-1")], "hi-2 preferred"),
        # No rung is soon enough: the cheapest of all, which may be on the best rung.
        ([estimate("hi-1", 9.0), estimate("mid-1", 7.0), estimate("lo-1", 8.0)], "mid-1 spill"),
        ([estimate("hi-1", 7.0), estimate("mid-1", 9.0), estimate("lo-1", 8.0)], "hi-1 preferred"),
        ([estimate("mid-1"), estimate("lo-1")], "mid-1 fallback"),
        ([estimate("hi-1", has_room=False), estimate("lo-1")], "lo-1 spill"),
        # A rung of unknown speed answers as long as it has room.
        ([estimate("hi-1", None, requests=50), estimate("lo-1")], "hi-1 preferred"),
        ([estimate("hi-1", 5.0), estimate("mid-1", None)], "mid-1 spill"),
    ],
)
def test_the_ladder(estimates: Sequence[LatencyEstimate], expected: str | None) -> None:
    """The highest rung that is soon enough answers; a lower one is `spill` because of load, else `fallback`."""
    assert chosen(*estimates) == expected


@pytest.mark.parametrize(
    "rungs, permitted, pinned, expected",
    [
        (RUNGS, RUNGS, False, "hi-1 preferred"),
        (RUNGS, (MID, LO), False, "mid-1 floor"),
        (RUNGS, (HI, LO), False, "hi-1 preferred"),
        ((LO,), (LO,), True, "lo-1 pinned"),
        ((LO,), (LO,), False, "lo-1 preferred"),
    ],
)
def test_reasons(rungs: tuple[Variant, ...], permitted: tuple[Variant, ...], pinned: bool, expected: str) -> None:
    """The best permitted rung is `preferred`, or `floor` if a better one is not permitted; a variant is `pinned`."""
    estimates = [estimate(f"{rung.name}-1") for rung in RUNGS]
    target = Target("smol", rungs, NO_FLOOR, pinned)
    assert chosen(*estimates, request=request(target=target, rungs=permitted, prompt_tokens=100)) == expected


@pytest.mark.parametrize(
    "rungs, fleet, expected",
    [
        ((MID, LO), ["mid-1", "lo-1"], "mid-1 canary"),
        ((MID, LO), ["lo-1"], "lo-1 fallback"),
        # Lower down it is as any other variant.
        ((HI, MID), ["hi-1", "mid-1"], "hi-1 preferred"),
        ((HI, MID), ["mid-1"], "mid-1 fallback"),
    ],
)
def test_the_new_variant_of_a_rollout(rungs: tuple[Variant, ...], fleet: list[str], expected: str) -> None:
    """On the ladder of the canary arm it is `canary` where it is the best rung."""
    target = Target("smol", rungs, NO_FLOOR, pinned=False, canary="mid")
    assert chosen(*map(estimate, fleet), request=request(target=target, rungs=rungs)) == expected


# Within a rung


@pytest.mark.parametrize(
    "request_, expected",
    [
        (LONG, "hi-2"),
        # A long prompt goes to the replica that reads faster, or has it cached.
        (request(prompt_tokens=2000), "hi-1"),
        (request(prompt_tokens=2000, cached_tokens={"hi-2": 1900.0}), "hi-2"),
        (request(prompt_tokens=100, tried=frozenset({"hi-2"})), "hi-1"),
    ],
)
def test_the_cheapest_replica(request_: RoutingRequest, expected: str) -> None:
    """The cost is the wait, plus reading without what is cached; a replica that was tried is not asked again."""
    replicas = estimate("hi-1", 0.5, token_seconds=0.001), estimate("hi-2", 0.3, token_seconds=0.002)
    assert chosen(*replicas, request=request_) == f"{expected} preferred"


def test_equals_take_turns() -> None:
    """Replicas with the same cost get the same share."""
    equal = [estimate(f"hi-{number}") for number in range(3)]
    turns = Counter(chosen(*equal, request=request(turn=turn)) for turn in range(30))
    assert turns == {f"hi-{number} preferred": 10 for number in range(3)}


def test_the_shortest_queue_where_a_speed_is_unknown() -> None:
    """One unknown speed is enough: seconds and requests cannot be compared."""
    replicas = estimate("hi-1", 0.1, requests=5), estimate("hi-2", None, requests=3), estimate("hi-3", 9.0, requests=4)
    assert chosen(*replicas) == "hi-2 preferred"
    assert {chosen(*replicas, request=request(turn=turn)) for turn in range(6)} == {"hi-2 preferred"}


def test_an_unknown_speed_beside_a_slow_replica() -> None:
    """A replica of unknown speed is taken for soon enough: a slow one with a shorter queue does not make it spill."""
    mixed = estimate("hi-1", 4.0, requests=0), estimate("hi-2", None, requests=1), estimate("lo-1")
    assert named(made := decision(*mixed)) == "hi-2 preferred"
    assert made.gates == {}


def test_a_context_that_is_too_short() -> None:
    """A replica whose context is too short is not asked, unless all are: then the engine says so."""
    short, long = estimate("hi-1", context_tokens=100.0), estimate("lo-1", context_tokens=1000.0)
    prompt = request(prompt_tokens=200)
    assert chosen(short, long, request=prompt) == "lo-1 fallback"
    assert chosen(short, request=prompt) == "hi-1 preferred"
    assert chosen(short, msgspec.structs.replace(long, has_room=False), request=prompt) is None


# Conversations

PAUSED_AT_MID = Placement("mid", "mid-1", idle_since_seconds=NOW - PAUSE_SECONDS)
PAUSED_AT_HI = Placement("hi", "hi-1", idle_since_seconds=NOW - PAUSE_SECONDS)


@pytest.mark.parametrize(
    "placement, gates, estimates, expected",
    [
        # It stays on its replica if that costs little more; concurrent requests are not turns of a conversation.
        (Placement("hi", "hi-2"), {}, [estimate("hi-1"), estimate("hi-2", 0.05)], "hi-2 preferred"),
        (Placement("hi", "hi-2"), {}, [estimate("hi-1"), estimate("hi-2", 1.5)], "hi-1 preferred"),
        (Placement("hi", "hi-2", running=1), {}, [estimate("hi-1"), estimate("hi-2", 0.05)], "hi-1 preferred"),
        # It stays on its variant while a rung spills, and returns when none does.
        (Placement("mid", "mid-1"), SPILLING, [estimate("hi-1", 0.6), estimate("mid-1", 1.0)], "mid-1 spill"),
        (Placement("mid", "mid-1"), {}, [estimate("hi-1", 0.6), estimate("mid-1", 1.0)], "hi-1 preferred"),
        (Placement("mid", "mid-1"), SPILLING, [estimate("hi-1", 0.0), estimate("mid-1", 2.5)], "mid-1 spill"),
        (Placement("mid", "mid-1"), SPILLING, [estimate("hi-1", 0.6), estimate("mid-1", 3.0)], "hi-1 preferred"),
        (Placement("mid", "mid-1"), SPILLING, [estimate("hi-1", 9.0), estimate("mid-1", 2.4)], "mid-1 spill"),
        (Placement("hi", "hi-1"), SPILLING, [estimate("hi-1", 2.5), estimate("mid-1")], "hi-1 preferred"),
        (Placement("hi", "hi-1"), SPILLING, [estimate("hi-1", 2.6), estimate("mid-1")], "mid-1 spill"),
        (Placement("hi", "hi-1"), {}, [estimate("hi-1", 2.5), estimate("mid-1")], "hi-1 preferred"),
        # After a pause it is a new one: it returns where there is room, and goes down with the others.
        (PAUSED_AT_MID, SPILLING, [estimate("hi-1", 0.1), estimate("mid-1")], "hi-1 preferred"),
        (PAUSED_AT_HI, SPILLING, [estimate("hi-1", 1.5), estimate("mid-1")], "mid-1 spill"),
        # Its variant is gone, or not permitted any more.
        (Placement("old", "old-1"), {}, [estimate("hi-1"), estimate("mid-1")], "hi-1 preferred"),
    ],
)
def test_conversations(
    placement: Placement,
    gates: Mapping[tuple[str, str], SpillGate],
    estimates: Sequence[LatencyEstimate],
    expected: str,
) -> None:
    """A conversation changes replicas if that saves time, and variants as rarely as possible."""
    assert chosen(*estimates, request=request(prompt_tokens=100, placement=placement), gates=gates) == expected


def test_a_conversation_whose_rung_is_gone_moves_and_stays() -> None:
    """It is answered below, and returns only when its rung has been there and free for `dwell_seconds`."""
    gates = dict[tuple[str, str], SpillGate]()
    here, answered = Placement("hi", "hi-1"), []
    for now in range(30):
        fleet = [estimate("mid-1"), *([] if now < 5 else [estimate("hi-1")])]
        made = decision(*fleet, request=request(placement=here), now=float(now), gates=gates)
        gates.update(made.gates)
        assert made.candidate is not None
        here = Placement(made.candidate.variant.name, made.candidate.replica.id)
        answered.append(named(made))
    assert answered == ["mid-1 fallback"] * 5 + ["mid-1 spill"] * 10 + ["hi-1 preferred"] * 15
    assert decision(estimate("mid-1"), request=request()).gates == {}


# Spilling


def test_a_spilling_rung_sends_a_share_down() -> None:
    """The share grows with the wait, and goes down only where the next rung is sooner."""
    gates, counts = dict(SPILLING), Counter[str | None]()
    for _ in range(100):
        made = decision(estimate("hi-1", 0.625), estimate("mid-1"), gates=gates)
        gates.update(made.gates)
        assert made.candidate is not None
        counts[made.candidate.replica.id] += 1
    assert counts == {"hi-1": 75, "mid-1": 25}
    down = {("smol", "hi"): SpillGate(spilling=True, owed=0.99)}
    assert chosen(estimate("hi-1", 0.625), estimate("mid-1", 0.9), gates=down) == "hi-1 preferred"
    assert chosen(estimate("hi-1", 0.625), estimate("mid-1", 0.9), estimate("lo-1"), gates=down) == "lo-1 spill"


def test_a_decision_returns_the_gates_that_changed() -> None:
    """Every rung but the last has a gate; unchanged gates are left out."""
    made = decision(estimate("hi-1", 9.0), estimate("mid-1", 5.0), estimate("lo-1", 9.0))
    assert {key: gate.spilling for key, gate in made.gates.items()} == {("smol", "hi"): True, ("smol", "mid"): True}
    assert decision(estimate("hi-1", 0.1), estimate("mid-1", 5.0)).gates == {}
    assert decision(estimate("hi-1", has_room=False), estimate("lo-1")).gates["smol", "hi"].spilling
    pinned = request(target=Target("lo", (LO,), NO_FLOOR, pinned=True), rungs=(LO,), prompt_tokens=100)
    assert decision(estimate("lo-1", 99.0), request=pinned).gates == {}


# Breakers and overloads


def test_a_failing_replica_is_the_last_resort() -> None:
    """At most half of a variant's replicas are barred, whatever rungs are below; those that time out are after them."""
    estimates = estimate("hi-1"), estimate("hi-2"), estimate("lo-1")
    one = {"hi-1": opened()}
    assert chosen(*estimates, now=0.5, breakers=one) == "hi-2 preferred"
    both = {"hi-1": opened(), "hi-2": failed(opened(), 0.1)}
    assert chosen(*estimates, now=0.5, breakers=both) == "hi-1 preferred"
    assert chosen(estimates[0], estimates[2], now=0.5, breakers=one) == "hi-1 preferred"
    silent = {name: failed(breaker, 0.2, timed_out=True) for name, breaker in both.items()}
    assert chosen(*estimates, now=0.5, breakers=silent) == "lo-1 fallback"
    assert chosen(*estimates[:2], now=0.5, breakers=silent) == "hi-1 preferred"
    tried = request(tried=frozenset({"lo-1"}))
    assert chosen(*estimates, request=tried, now=0.5, breakers=silent) == "hi-1 preferred"


@pytest.mark.parametrize(
    "overload, now, expected",
    [
        (refused(NOT_OVERLOADED, 0.0), 0.1, "lo-1 spill"),
        (refused(NOT_OVERLOADED, 0.0), 9.0, "hi-1 preferred"),
        (Overload(limit=3), 9.0, "lo-1 spill"),
        (Overload(limit=4), 9.0, "hi-1 preferred"),
    ],
)
def test_an_overloaded_replica(overload: Overload, now: float, expected: str) -> None:
    """An overloaded replica is spared for a while, and then gets as many requests as its limit."""
    estimates = estimate("hi-1", requests=3), estimate("lo-1")
    assert chosen(*estimates, now=now, overloads={"hi-1": overload}) == expected


def test_has_room() -> None:
    """There is room if any permitted replica has some, also behind an open breaker."""
    full = estimate("hi-1", has_room=False)
    assert not room(request(), cluster(full), 0.0)
    assert room(request(), cluster(full, estimate("lo-1", 99.0)), 0.0)
    assert not room(request(rungs=(HI, MID)), cluster(full, estimate("lo-1")), 0.0)
    barred = {name: opened() for name in ("hi-1", "hi-2", "hi-3")}
    three = [estimate(name) for name in barred]
    assert room(request(), cluster(*three, breakers=barred), 0.5)


# Properties


@given(fleets, requests, states, ladders, st.floats(0, 200))
def test_only_permitted_rungs_answer(
    fleet: list[LatencyEstimate],
    any_request: RoutingRequest,
    state: dict[str, Any],
    rungs: tuple[Variant, ...],
    now: float,
) -> None:
    """Under any load and fault only a permitted replica with room answers, and one does if there is any."""
    any_request = msgspec.structs.replace(any_request, rungs=rungs)
    state_now = cluster(*fleet, **state)
    candidate = decide(any_request, state_now, now).candidate
    if candidate is not None:
        assert candidate.variant in rungs
        assert candidate.replica.variant == candidate.variant.name
        assert candidate.replica.has_room
        assert candidate.replica.id not in any_request.tried
        assert candidate.replica in fleet
    elif not any_request.tried and not any_request.prompt_tokens and not any_request.answer_tokens:
        assert not room(any_request, state_now, now)


@given(fleets, requests, states, ladders, st.floats(0, 200))
def test_has_room_agrees_with_the_decision(
    fleet: list[LatencyEstimate],
    any_request: RoutingRequest,
    state: dict[str, Any],
    rungs: tuple[Variant, ...],
    now: float,
) -> None:
    """Where a queue sees room, its requests find a replica with a context that is long enough."""
    any_request = msgspec.structs.replace(any_request, rungs=rungs, tried=NO_REPLICAS)
    state_now = cluster(*fleet, **state)
    needed_tokens = any_request.needed_tokens
    context_tokens = shortest_fitting_context(rungs, state_now, needed_tokens, any_request.tools)
    candidate = decide(any_request, state_now, now).candidate
    assert (candidate is not None) == room(any_request, state_now, now, context_tokens)
    if candidate is not None and context_tokens:
        assert needed_tokens <= context_tokens <= candidate.replica.context_tokens


LONG_WAITS = [estimate("hi-1", 0.0, context_tokens=100.0), estimate("hi-2", 3.0), estimate("lo-1")]


@pytest.mark.parametrize(
    "estimates, request_, expected, spilling",
    [
        # The replica that has the prompt cached is the cheapest although it waits: the rung is not slow.
        (
            [estimate("hi-1", 3.0), estimate("hi-2", 0.0), estimate("lo-1")],
            request(prompt_tokens=10_000, cached_tokens={"hi-1": 10_000.0}),
            "hi-1 preferred",
            None,
        ),
        # A request that failed on the fast replica, or is too long for it, goes down alone.
        (
            [estimate("hi-1"), estimate("hi-2", 3.0), estimate("lo-1")],
            request(tried=frozenset({"hi-1"})),
            "lo-1 spill",
            None,
        ),
        (LONG_WAITS, request(prompt_tokens=1000), "lo-1 spill", None),
        (LONG_WAITS, request(), "hi-1 preferred", None),
        ([estimate("hi-1", 2.5), estimate("hi-2", 3.0), estimate("lo-1")], request(), "lo-1 spill", True),
        # An unknown speed opens no gate.
        ([estimate("hi-1", None), estimate("lo-1")], request(), "hi-1 preferred", None),
    ],
)
def test_what_concerns_one_request_changes_no_gate(
    estimates: Sequence[LatencyEstimate], request_: RoutingRequest, expected: str, spilling: bool | None
) -> None:
    """Its cached prompt, the replicas that it has tried, and its length are no reason to send others down."""
    made = decision(*estimates, request=request_)
    assert named(made) == expected
    gate = made.gates.get(("smol", "hi"))
    assert (None if gate is None else gate.spilling) is spilling


def test_a_gate_closes_where_speeds_are_unknown() -> None:
    """A gate that opened for lack of room closes once a replica of unknown speed has room."""
    made = decision(estimate("hi-1", None), estimate("lo-1"), gates=SPILLING)
    free = SpillGate(spilling=True, free_since_seconds=NOW)
    assert made.gates == {("smol", "hi"): free}
    made = decision(estimate("hi-1", None), estimate("lo-1"), gates=made.gates, now=NOW + 10)
    assert made.gates == {("smol", "hi"): SpillGate(spilling=False, since_seconds=NOW + 10)}


def test_a_session_shared_by_many_is_not_a_conversation() -> None:
    """Its concurrent turns spill by the share like other requests, instead of all or none."""
    gates, placement, counts = dict(SPILLING), Placement("hi", "hi-1", 50), Counter[str]()
    for turn in range(100):
        shared = request(prompt_tokens=100, turn=turn, placement=placement)
        made = decision(estimate("hi-1", 0.75), estimate("lo-1"), request=shared, gates=gates)
        gates.update(made.gates)
        assert made.candidate is not None
        placement = Placement(made.candidate.variant.name, made.candidate.replica.id, 50)
        counts[placement.variant] += 1
    assert counts == {"hi": 50, "lo": 50}


@given(fleets, requests)
def test_no_rung_above_the_choice_is_soon_enough(fleet: list[LatencyEstimate], any_request: RoutingRequest) -> None:
    """While no gate is open, every rung above the one that answers is too slow."""
    candidate = decision(*fleet, request=any_request).candidate
    if candidate is None:
        return
    empty = msgspec.structs.replace(any_request, prompt_tokens=0.0, answer_tokens=None)
    place = RUNGS.index(candidate.variant)
    for rung in RUNGS[:place]:
        better = decision(*fleet, request=msgspec.structs.replace(empty, rungs=(rung,))).candidate
        slow = better is None or better.replica.wait_seconds > SPILL.after_seconds
        assert slow or any_request.prompt_tokens or any_request.answer_tokens


def test_a_decision_looks_at_its_own_candidates_only() -> None:
    """Replicas of other variants are not looked at, nor rungs below the one that answers."""
    looked_up: list[str] = []

    def estimates(variant: str) -> Sequence[LatencyEstimate]:
        looked_up.append(variant)
        return [estimate(f"{variant}-{number}") for number in range(3)]

    decide(LONG, ClusterState(estimates), time.monotonic())
    assert looked_up == ["hi"]
