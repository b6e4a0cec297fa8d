"""Explanations of decisions, and the snapshots from which they are made later."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from math import inf
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.errors import ConfigError
from config.schema import NO_FLOOR, Floor, LimitSettings, Spill, TimeoutSettings
from config.variant import QualityMeasures, Variant
from gateway.cli.route import explain_hypothetical, explain_recorded
from gateway.errors import NotAllowed, RequestError, UnknownModel
from gateway.keys import Keys
from gateway.live_config import LiveConfig
from gateway.proxy.decision_log import DecisionLog, snapshot_now
from gateway.proxy.load.tracker import LoadTracker
from gateway.proxy.routing_features import session_from_name
from gateway.routing.cluster_state import ClusterState
from gateway.routing.explain import Explanation, explain
from gateway.routing.filters import Rejection
from gateway.routing.latency import LatencyEstimate
from gateway.routing.overload import NOT_OVERLOADED, Overload, refused
from gateway.routing.pick import decide
from gateway.routing.request import RoutingRequest
from gateway.routing.sessions import Placement
from gateway.routing.snapshot import (
    AbsentReplica,
    CallerView,
    Snapshot,
    TargetView,
    floor_limits,
    nested_gates,
    read_snapshot,
    variant_views,
)
from gateway.routing.spill import SpillGate
from gateway.routing.split import NO_WEIGHTS
from gateway.routing.target import Catalog, Target
from serving.registry import Registry
from serving.replica import Replica, State
from tests.gateway.routing.test_pick import (
    HI,
    HI_RUNG,
    LO,
    LO_RUNG,
    LONG,
    MID,
    MID_RUNG,
    NOW,
    RUNGS,
    SPILL,
    TARGET,
    cluster,
    estimate,
    fleets,
    opened,
    request,
    requests,
    states,
)

BAD = Variant("bad", "int4", QualityMeasures("measured", 0.3, 0.7, 1.3))
EXCLUDED = Rejection(BAD, "its verdict is fail")


def explained(
    *estimates: LatencyEstimate,
    request: RoutingRequest = LONG,
    now: float = NOW,
    wait_seconds: float = inf,
    absent: tuple[AbsentReplica, ...] = (),
    **state: Any,
) -> Explanation:
    """Explain the decision on a request in such a cluster."""
    return explain(request, cluster(*estimates, **state), now, absent=absent, wait_seconds=wait_seconds)


def filtered(target: Target, floor: Floor = NO_FLOOR, precisions: frozenset[str] | None = None) -> RoutingRequest:
    """A request with a floor and precisions, and the rungs that satisfy them."""
    rungs = target.filter((floor,), precisions).permitted
    return request(target=target, rungs=rungs, prompt_tokens=100, floors=(floor,), precisions=precisions)


@given(fleets, requests, states, st.floats(0, 200))
def test_the_explanation_is_of_the_decision(
    fleet: list[LatencyEstimate], any_request: RoutingRequest, state: dict[str, Any], now: float
) -> None:
    """In any state the explained choice is the decision's, and every other replica has a reason, a rank and a cost."""
    state_now = cluster(*fleet, **state)
    candidate = decide(any_request, state_now, now).candidate
    explanation = explain(any_request, state_now, now)
    chosen = explanation.chosen
    assert (chosen and (chosen.replica, chosen.reason)) == (candidate and (candidate.replica.id, candidate.reason))
    assert explanation.because
    assert {each.replica for each in explanation.candidates} == {
        each.id for each in fleet if each.variant in {"hi", "mid", "lo"}
    }
    assert [each.replica for each in explanation.candidates if not each.why_not] == ([chosen.replica] if chosen else [])
    ranks = [each.rank for each in explanation.candidates if each.rank is not None]
    assert ranks == list(range(1, len(ranks) + 1))
    assert not chosen or explanation.candidates[0].replica == chosen.replica
    for each in explanation.candidates:
        if (terms := each.terms) is not None:
            parts = (terms.queue, terms.ahead, terms.kv, terms.reading, -terms.cached, terms.answering)
            assert sum(parts) == pytest.approx(terms.total, abs=1e-6)
    assert len(explanation.rungs) == len(RUNGS)


NO_WAIT = "its wait is 0.000 s, spill.after_seconds is 2"
OTHERS = {"mid-1": "hi is a better rung and answers", "lo-1": "hi is a better rung and answers"}
DOWN = {("smol", "hi"): SpillGate(spilling=True, since_seconds=88, owed=0.99)}


@pytest.mark.parametrize(
    "estimates, given, because, reasons",
    [
        (
            [estimate("hi-1"), estimate("hi-2", 0.5), estimate("mid-1"), estimate("lo-1")],
            {},
            NO_WAIT,
            {"hi-1": "", "hi-2": "0.500 s later than hi-1", **OTHERS},
        ),
        (
            [estimate("hi-1", 2.5), estimate("mid-1"), estimate("lo-1")],
            {},
            f"{NO_WAIT}; hi is too slow: its wait is 2.500 s",
            {
                "mid-1": "",
                "hi-1": "its rung is too slow: the wait of hi-1 is 2.500 s",
                "lo-1": "mid is a better rung and answers",
            },
        ),
        (
            [estimate("hi-1", 0.875), estimate("mid-1")],
            {"gates": DOWN},
            f"{NO_WAIT}; hi spills this request",
            {"mid-1": "", "hi-1": "its rung spills this request"},
        ),
        (
            [estimate("hi-1", 0.875), estimate("mid-1", 1.0), estimate("lo-1", 1.5)],
            {"gates": DOWN},
            "its wait is 0.875 s, spill.after_seconds is 2",
            {"hi-1": "", "mid-1": "hi is a better rung and answers", "lo-1": "hi is a better rung and answers"},
        ),
        (
            [estimate("hi-1", 0.875), estimate("mid-1", 1.0), estimate("lo-1")],
            {"gates": DOWN},
            f"{NO_WAIT}; hi spills this request; mid could answer",
            {
                "lo-1": "",
                "hi-1": "its rung spills this request",
                "mid-1": "its rung is no sooner than the one above that spills this request",
            },
        ),
        (
            [estimate("hi-1", 9.0), estimate("mid-1", 7.0)],
            {},
            "lowest cost of all: its wait is 7.000 s, and no rung is within spill.after_seconds (2)",
            {"mid-1": "", "hi-1": "2.000 s later than mid-1"},
        ),
        (
            [estimate("mid-1"), estimate("lo-1")],
            {},
            f"{NO_WAIT}; hi has no replica to ask",
            {"mid-1": "", "lo-1": "mid is a better rung and answers"},
        ),
        (
            [estimate("hi-1", has_room=False, requests=512), estimate("lo-1")],
            {},
            f"{NO_WAIT}; hi has no room; mid has no replica to ask",
            {"lo-1": "", "hi-1": "full: 512 of at most 512 requests in flight"},
        ),
        (
            [estimate("hi-1", None, requests=5), estimate("hi-2", None, requests=3), estimate("lo-1")],
            {},
            "speed unknown: the shortest queue of the best rung that has a replica",
            {"hi-2": "", "hi-1": "5 requests, hi-2 has 3", "lo-1": "hi is a better rung and answers"},
        ),
        (
            [estimate("hi-1", context_tokens=50.0), estimate("lo-1")],
            {},
            f"{NO_WAIT}; hi has no replica to ask; mid has no replica to ask",
            {"lo-1": "", "hi-1": "context too short: 50 tokens"},
        ),
        (
            [estimate("hi-1"), estimate("hi-2"), estimate("lo-1")],
            {"breakers": {"hi-1": opened()}, "now": 0.5},
            NO_WAIT,
            {"hi-2": "", "hi-1": "its breaker is open", "lo-1": "hi is a better rung and answers"},
        ),
        (
            [estimate("hi-1")],
            {"breakers": {"hi-1": opened()}, "now": 0.5},
            "last resort: its breaker is open, but no other replica can be asked",
            {"hi-1": ""},
        ),
        (
            [estimate("hi-1"), estimate("lo-1", requests=3)],
            {"overloads": {"hi-1": refused(NOT_OVERLOADED, 99.9), "lo-1": Overload(limit=3)}},
            "no replica has room: the request waits in the queue",
            {
                "hi-1": "overloaded: it refused a request, spared for 0.15 s",
                "lo-1": "overloaded: it refused a request, limit 3",
            },
        ),
        (
            [estimate("hi-1"), estimate("hi-2", 0.05)],
            {"request": request(prompt_tokens=100, placement=Placement("hi", "hi-2"))},
            "its wait is 0.050 s, spill.after_seconds is 2",
            {"hi-2": "", "hi-1": "0.050 s sooner, but the conversation stays on hi-2"},
        ),
        (
            [estimate("hi-1"), estimate("hi-2")],
            {"request": request(tried=frozenset({"hi-1"}))},
            NO_WAIT,
            {"hi-2": "", "hi-1": "it has failed this request"},
        ),
        (
            [estimate("hi-1"), estimate("hi-2")],
            {},
            NO_WAIT,
            {"hi-1": "", "hi-2": "same cost as hi-1; equal replicas take turns"},
        ),
        (
            [estimate("hi-1", 40.0, measured=False)],
            {"wait_seconds": 30},
            "lowest cost of all: its wait is 40.000 s, and no rung is within spill.after_seconds (2)",
            {"hi-1": ""},
        ),
        (
            [estimate("hi-1", 40.0)],
            {"wait_seconds": 30},
            "refused (429): the soonest is hi-1, its wait is 40.000 s, the request may wait 30 s",
            {"hi-1": "its wait exceeds that of the request: 30 s"},
        ),
        ([], {}, "no replica that may answer is ready", {}),
    ],
)
def test_reasons(
    estimates: list[LatencyEstimate], given: dict[str, Any], because: str, reasons: dict[str, str]
) -> None:
    """An explanation says what decided it, and why each of the other replicas was not chosen."""
    explanation = explained(*estimates, **given)
    assert (explanation.because, {each.replica: each.why_not for each in explanation.candidates}) == (because, reasons)


def test_a_lower_rung_that_is_no_sooner() -> None:
    """A spilling rung answers all the same if no rung below it is sooner."""
    explanation = explained(estimate("hi-1", 0.875), estimate("mid-1", 1.0), gates=DOWN)
    assert explanation.chosen is not None
    assert explanation.chosen.replica == "hi-1"
    assert [(rung.variant, rung.verdict) for rung in explanation.rungs] == [
        ("hi", "answers"),
        ("mid", "could answer"),
        ("lo", "has no replica to ask"),
    ]


def test_gates() -> None:
    """A rung has the time since its gate opened, and the share of requests that go down."""
    explanation = explained(estimate("hi-1", 0.875), estimate("mid-1"), gates=DOWN)
    assert [(rung.variant, rung.spilling_seconds, rung.share_down) for rung in explanation.rungs] == [
        ("hi", 12, 0.25),
        ("mid", None, 0),
        ("lo", None, 0),
    ]
    slow = explained(estimate("hi-1", 9.0), estimate("mid-1")).rungs[0]
    assert (slow.spilling_seconds, slow.share_down, slow.wait_seconds) == (0, 1, 9)


def test_variants_that_may_not_answer() -> None:
    """Each rejected variant has its own reason: a missed floor, a precision, or a failed evaluation."""
    target = Target("smol", RUNGS, Floor(kl_mean=0.04), pinned=False, spill=SPILL, excluded=(EXCLUDED,))
    estimates = [estimate(name) for name in ("hi-1", "mid-1", "lo-1", "bad-1")]
    explanation = explained(*estimates, request=filtered(target, precisions=frozenset({"int8", "int4"})))
    assert [each.replica for each in explanation.candidates] == ["mid-1"]
    assert {each.variant: each.why for each in explanation.refused} == {
        "hi": "precision bf16 was not asked for",
        "lo": "kl_mean 0.05 misses the floor 0.04",
        "bad": "its verdict is fail",
    }
    unmet = explained(*estimates, request=filtered(target, Floor(length_ratio=1.0)))
    assert (unmet.chosen, unmet.because, unmet.rungs) == (None, "no variant is good enough", ())


def test_replicas_that_are_not_ready() -> None:
    """Absent replicas of the ladder are listed, also of variants that may not answer; a stale estimate is marked."""
    absent = (AbsentReplica("hi-1", "hi", "starting", ""), AbsentReplica("x-1", "x", "failed", "crashed"))
    explanation = explained(estimate("lo-1", stale=True), absent=absent)
    assert explanation.absent == absent[:1]
    assert explanation.candidates[0].stale


def test_the_terms_of_a_cost() -> None:
    """Cached tokens are subtracted from reading, but not more than the prompt has."""
    replica = estimate(
        *("hi-1", 1.0),
        queue_seconds=0.5,
        ahead_seconds=0.3,
        kv_seconds=0.2,
        fixed_seconds=1.1,
        token_seconds=0.001,
        answer_seconds=0.02,
    )
    cached = request(prompt_tokens=100, answer_tokens=10, cached_tokens={"hi-1": 1000.0})
    terms = explained(replica, request=cached).candidates[0].terms
    assert terms is not None
    figures = (terms.queue, terms.ahead, terms.kv, terms.reading, terms.cached, terms.answering, terms.total)
    assert figures == pytest.approx((0.5, 0.3, 0.2, 0.2, 0.1, 0.2, 1.3))


# Snapshots


def snapshot(
    *estimates: LatencyEstimate,
    target: Target = TARGET,
    gates: dict[tuple[str, str], SpillGate] | None = None,
    **fields: Any,
) -> Snapshot:
    """A snapshot of a cluster with these replicas."""
    by_variant: dict[str, tuple[LatencyEstimate, ...]] = {}
    for each in estimates:
        by_variant[each.variant] = (*by_variant.get(each.variant, ()), each)
    pinned = Target("lo", (LO_RUNG,), NO_FLOOR, pinned=True)
    return Snapshot(
        recorded=datetime(2026, 1, 1, tzinfo=UTC),
        now_seconds=NOW,
        variants=variant_views((HI, MID, LO, BAD)),
        models={each.name: TargetView.of(each, 30.0, NO_WEIGHTS) for each in (target, pinned)},
        estimates=by_variant,
        gates=nested_gates(gates or {}),
        **fields,
    )


@given(fleets, requests, states)
def test_a_snapshot_decides_as_the_gateway_did(
    fleet: list[LatencyEstimate], any_request: RoutingRequest, state: dict[str, Any]
) -> None:
    """A snapshot survives JSON, and a decision on it is the same as on the state that it was made of."""
    target = Target("smol", RUNGS, Floor(kl_mean=0.04), False, spill=SPILL, trust_declared=True, excluded=(EXCLUDED,))
    taken = snapshot(*fleet, target=target, **state)
    read = read_snapshot(taken.to_json(), "f")
    assert read == taken
    assert read.target("smol") == target
    now, later = (
        msgspec.structs.replace(any_request, target=each, rungs=each.filter((), None).permitted)
        for each in (target, read.target("smol"))
    )
    assert explain(later, read.cluster(), NOW) == explain(now, cluster(*fleet, **state), NOW)


@pytest.mark.parametrize(
    "text, words",
    [
        (b"", "f: not a valid routing snapshot: Input data was truncated"),
        (b"{}", "missing required field"),
        (b"\xff", "malformed"),
        (
            msgspec.json.encode({**msgspec.to_builtins(snapshot()), "format": 1}),
            r"Invalid enum value 1 - at `\$.format`",
        ),
        (
            msgspec.json.encode({**msgspec.to_builtins(snapshot()), "format": 3}),
            r"Invalid enum value 3 - at `\$.format`",
        ),
        (msgspec.json.encode({**msgspec.to_builtins(snapshot()), "variants": {}}), "'hi'"),
        (msgspec.json.encode({**msgspec.to_builtins(snapshot()), "breakers": {"a": {"x": []}, "b": 1}}), "Expected"),
    ],
)
def test_invalid_snapshots(text: bytes, words: str) -> None:
    """The error names the place of the snapshot, and the command that makes one."""
    with pytest.raises(ConfigError, match=words) as caught:
        read_snapshot(text, "f")
    assert str(caught.value).endswith("; `quantgate route state` makes one")


@pytest.mark.parametrize("wait_seconds, chosen", [(inf, "hi-1"), (50.0, "hi-1"), (30.0, None)])
@given(blocks=st.lists(st.integers(0), max_size=3).map(tuple))
def test_a_recorded_decision(wait_seconds: float, chosen: str | None, blocks: tuple[int, ...]) -> None:
    """A record has what the decision was made on, without the prompt's hashes; a wait too long is not a choice."""
    state = cluster(estimate("hi-1", 40.0), estimate("mid-1", 41.0), breakers={"lo-1": opened()})
    recorded = request(
        rungs=(HI_RUNG, MID_RUNG),
        prompt_tokens=100,
        turn=7,
        request_id="r",
        blocks=blocks,
        floors=(NO_FLOOR, Floor(kl_mean=0.04)),
        precisions=frozenset({"bf16", "int8"}),
        cached_tokens={"hi-1": 50.0},
    )
    decisions = DecisionLog()
    decisions.append(recorded, state, decide(recorded, state, NOW), NOW, wait_seconds)
    record = decisions.find("r")
    assert record is not None
    read = read_snapshot(record.snapshot(103.0).to_json(), "f")
    assert read.request is not None
    again, wait_again = read.routing_request()
    assert (read.request.chosen, again.blocks, read.now_seconds, wait_again) == (chosen, (), NOW, wait_seconds)
    assert read.recorded <= datetime.now(UTC) - timedelta(seconds=3)
    explanation = explain_recorded(read)
    assert (explanation.chosen and explanation.chosen.replica) == chosen
    assert [each.variant for each in explanation.refused] == ["lo"]
    terms = explanation.candidates[0].terms
    assert terms is not None
    assert terms.cached == pytest.approx(0.05)


def test_a_snapshot_has_no_secrets() -> None:
    """The API key of a replica is in no snapshot, whether the replica is ready or not."""
    registry = Registry()
    ready = Replica("hi-1", "hi", "bf16", "http://hi-1", "m1", api_key="hunter2")
    registry.put(ready, State.READY)
    registry.put(replace(ready, id="hi-2"), State.FAILED)
    load = LoadTracker(registry.in_flight, {})
    load.keep_only(registry.ready)
    live_config = LiveConfig(Catalog({}, {"hi": HI}), Keys(), LimitSettings())
    taken = snapshot_now(live_config, ClusterState(load.estimates), {}, registry, NOW)
    assert [each.id for each in taken.estimates["hi"]] == ["hi-1"]
    assert [each.id for each in taken.absent] == ["hi-2"]
    assert b"hunter2" not in taken.to_json()


# Hypothetical requests


SNAPSHOT = snapshot(
    estimate("hi-1", context_tokens=1000.0),
    estimate("hi-2", 0.05),
    estimate("mid-1"),
    estimate("lo-1"),
    sessions={
        session_from_name(b"chat", None): Placement("hi", "hi-2"),
        session_from_name(b"chat", "alice"): Placement("mid", "mid-1"),
    },
    callers={"alice": CallerView(frozenset({"smol"}), floor_limits(Floor(kl_mean=0.02)), 2000)},
)


def hypothetical(
    model: str,
    headers: dict[bytes, bytes] | None = None,
    *,
    key: str | None = None,
    prompt_tokens: int = 0,
    max_tokens: int | None = None,
    snapshot: Snapshot = SNAPSHOT,
) -> Explanation:
    """Explain the decision on a request that was not sent."""
    return explain_hypothetical(snapshot, model, headers or {}, key, prompt_tokens, max_tokens)


@pytest.mark.parametrize(
    "model, fields, expected",
    [
        ("smol", {}, "hi-1"),
        ("lo", {}, "lo-1"),
        ("smol", {"headers": {b"x-quantgate-precision": b"int4"}}, "lo-1"),
        (
            "smol",
            {"headers": {b"x-quantgate-floor": b"kl_mean=0.02", b"x-quantgate-precision": b"int8,int4"}},
            "mid-1",
        ),
        ("smol", {"headers": {b"x-session-id": b"chat"}}, "hi-2"),
        ("smol", {"prompt_tokens": 5000}, "hi-2"),
        ("smol", {"max_tokens": 5000}, "hi-2"),
        # The answers of this key may have 2000 tokens, which do not fit in the context of hi-1.
        ("smol", {"key": "alice"}, "hi-2"),
        ("smol", {"key": "alice", "max_tokens": 10}, "hi-1"),
    ],
)
def test_hypothetical_requests(model: str, fields: dict[str, Any], expected: str) -> None:
    """The choice depends on headers, lengths and the key, as it would for a real request."""
    chosen = hypothetical(model, **fields).chosen
    assert chosen is not None
    assert chosen.replica == expected


def test_the_floor_of_a_key() -> None:
    """A variant below the key's floor is refused with the figure that misses it."""
    assert [(each.variant, each.why) for each in hypothetical("smol", key="alice").refused] == [
        ("lo", "kl_mean 0.05 misses the floor 0.02")
    ]


@pytest.mark.parametrize(
    "model, fields, kind",
    [
        ("gpt", {}, UnknownModel),
        ("lo", {"key": "alice"}, NotAllowed),
        ("smol", {"key": "bob"}, RequestError),
        ("smol", {"headers": {b"x-quantgate-floor": b"speed=1"}}, RequestError),
    ],
)
def test_refused_hypothetical_requests(model: str, fields: dict[str, Any], kind: type[RequestError]) -> None:
    """The error is the one that the request itself would get."""
    with pytest.raises(kind):
        hypothetical(model, **fields)


def test_the_wait_of_a_model() -> None:
    """A request may wait as long as its model allows, or else as the gateway does."""
    short = TimeoutSettings(queue_seconds=0.5)
    own = Target("smol", RUNGS, NO_FLOOR, False, timeouts=short, spill=Spill())
    assert TargetView.of(own, 30.0, NO_WEIGHTS).wait_seconds == 0.5
    assert TargetView.of(TARGET, 30.0, NO_WEIGHTS).wait_seconds == 30.0
    assert hypothetical("smol", snapshot=snapshot(estimate("hi-1", 1.6), target=own)).chosen is None
