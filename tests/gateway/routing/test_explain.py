"""Explanations of decisions: why a replica was chosen, and why each of the others was not."""

from math import inf
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.schema import NO_FLOOR, Floor
from gateway.routing.explain import Explanation, explain
from gateway.routing.latency import LatencyEstimate
from gateway.routing.overload import NOT_OVERLOADED, Overload, refused
from gateway.routing.pick import decide
from gateway.routing.request import RoutingRequest
from gateway.routing.sessions import Placement
from gateway.routing.snapshot import AbsentReplica
from gateway.routing.spill import SpillGate
from gateway.routing.target import Target
from tests.gateway.routing.clusters import (
    EXCLUDED,
    LONG,
    NOW,
    RUNGS,
    SPILL,
    cluster,
    estimate,
    fleets,
    opened,
    request,
    requests,
    states,
)

AT_MID = request(prompt_tokens=100, placement=Placement("mid", "mid-1"))


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
            [estimate("hi-1", 0.1), estimate("mid-1")],
            {"request": AT_MID, "gates": {("smol", "hi"): SpillGate(True, NOW - 30, free_since_seconds=NOW - 3)}},
            f"{NO_WAIT}; hi leaves the conversation where it is: free for 3.0 of 10 s",
            {"mid-1": "", "hi-1": "the conversation stays on mid"},
        ),
        (
            [estimate("hi-1", 9.0), estimate("mid-1", 2.2), estimate("lo-1")],
            {"request": AT_MID},
            "its wait is 2.200 s, and the conversation stays on its rung up to 2.5 s",
            {"mid-1": "", "hi-1": "6.800 s later than mid-1", "lo-1": "mid is a better rung and answers"},
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
            [estimate("hi-1", hash=1), estimate("hi-2", 0.05, hash=0)],
            {"request": request(prompt_tokens=100, session_hash=1)},
            "its wait is 0.050 s, spill.after_seconds is 2",
            {"hi-2": "", "hi-1": "0.050 s sooner, but every gateway sends the conversation to hi-2"},
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
    explanation = explained(estimate("hi-1", 0.625), estimate("mid-1"), gates=DOWN)
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
