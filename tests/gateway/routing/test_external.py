"""External models rank behind every rung of replicas: they take what would wait too long, or be refused."""

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.external import ExternalModel
from config.schema import NO_FLOOR, Floor
from config.variant import EXTERNAL, QualityMeasures, Variant
from gateway.routing.explain import explain
from gateway.routing.latency import LatencyEstimate, ReplicaMetrics, estimate_latency
from gateway.routing.overload import Overload
from gateway.routing.pick import decide
from gateway.routing.request import NO_REPLICAS, RoutingRequest
from gateway.routing.sessions import Placement
from gateway.routing.speed import SpeedProfile
from gateway.routing.target import Target
from gateway.routing.waiting import has_room, shortest_fitting_context
from serving.replica import Replica
from tests.gateway.routing.clusters import (
    HI,
    LO,
    NOW,
    RUNGS,
    SPILL,
    SPILLING,
    any_estimate,
    chosen,
    cluster,
    decision,
    estimate,
    fleets,
    ladders,
    opened,
    request,
    requests,
    states,
)

GPT = Variant("gpt", EXTERNAL, QualityMeasures("declared", top1_agreement=0.9))
CLAUDE = Variant("claude", EXTERNAL, QualityMeasures("unknown"))
LADDER = (HI, LO, GPT)
ENDS_OUTSIDE = Target("smol", LADDER, NO_FLOOR, pinned=False, spill=SPILL)
OUTSIDE = estimate("gpt-1", None)


def asking(**fields: Any) -> RoutingRequest:
    """A request for an alias whose last rung is external."""
    return request(target=ENDS_OUTSIDE, rungs=LADDER, **{"prompt_tokens": 100, **fields})


@pytest.mark.parametrize(
    "estimates, expected",
    [
        # A rung of replicas that is soon enough answers, also where its own speed is unknown.
        ([estimate("hi-1"), estimate("lo-1"), OUTSIDE], "hi-1 preferred"),
        ([estimate("hi-1", 2.0), OUTSIDE], "hi-1 preferred"),
        ([estimate("hi-1", 9.0), estimate("lo-1", 2.0), OUTSIDE], "lo-1 spill"),
        ([estimate("lo-1", 2.0), OUTSIDE], "lo-1 fallback"),
        ([estimate("hi-1", None, requests=50), OUTSIDE], "hi-1 preferred"),
        # What would wait too long on every rung.
        ([estimate("hi-1", 2.1), OUTSIDE], "gpt-1 spill"),
        ([estimate("hi-1", 9.0), estimate("lo-1", 2.1), OUTSIDE], "gpt-1 spill"),
        # What would wait in the queue, or be refused.
        ([estimate("hi-1", has_room=False), estimate("lo-1", has_room=False), OUTSIDE], "gpt-1 spill"),
        ([OUTSIDE], "gpt-1 fallback"),
        # Without an external model that can be asked, all is as it was.
        ([estimate("hi-1", 9.0), estimate("lo-1", 7.0)], "lo-1 spill"),
        ([estimate("hi-1", 9.0), estimate("gpt-1", None, has_room=False)], "hi-1 preferred"),
        ([], None),
        ([estimate("gpt-1", None, has_room=False)], None),
        # Whatever its speed seems to be.
        ([estimate("hi-1", 1.0), estimate("gpt-1", 0.0)], "hi-1 preferred"),
        ([estimate("hi-1", 3.0), estimate("gpt-1", 99.0)], "gpt-1 spill"),
    ],
)
def test_behind_every_rung_of_replicas(estimates: Sequence[LatencyEstimate], expected: str | None) -> None:
    """It takes only what no rung can answer within `after_seconds`."""
    assert chosen(*estimates, request=asking()) == expected


@pytest.mark.parametrize(
    "changes, state, estimates, expected",
    [
        # A replica that has failed this request, whose context is too short, or that takes no tools.
        ({"tried": frozenset({"hi-1"})}, {}, [estimate("hi-1"), OUTSIDE], "gpt-1 fallback"),
        ({"prompt_tokens": 1000}, {}, [estimate("hi-1", context_tokens=50.0), OUTSIDE], "gpt-1 fallback"),
        ({"tools": True}, {}, [estimate("hi-1", tools=False), OUTSIDE], "gpt-1 fallback"),
        # Before replicas that are known to fail; a model that fails is asked after them.
        ({}, {"silent": {"hi-1": "silent"}}, [estimate("hi-1"), OUTSIDE], "gpt-1 fallback"),
        ({}, {"breakers": {"hi-1": opened(), "gpt-1": opened()}}, [estimate("hi-1"), OUTSIDE], "hi-1 preferred"),
        (
            {},
            {"silent": {"hi-1": "hung"}, "breakers": {"gpt-1": opened()}},
            [estimate("hi-1"), OUTSIDE],
            "gpt-1 fallback",
        ),
        ({"tried": frozenset({"gpt-1"})}, {}, [estimate("hi-1", 9.0), OUTSIDE], "hi-1 preferred"),
        ({}, {"overloads": {"gpt-1": Overload(until=NOW + 1)}}, [estimate("hi-1", 9.0), OUTSIDE], "hi-1 preferred"),
        # The last rung of replicas spills nothing by a gate: 1 s is no wait that is worth money.
        ({}, {"gates": SPILLING}, [estimate("hi-1", 1.0), OUTSIDE], "hi-1 preferred"),
        # No conversation lives on it.
        ({"placement": Placement("gpt", "gpt-1")}, {}, [estimate("hi-1", 1.9), OUTSIDE], "hi-1 preferred"),
        ({"placement": Placement("gpt", "gpt-1")}, {}, [estimate("lo-1", 1.9), OUTSIDE], "lo-1 fallback"),
        # One that lives on a rung stays for a quarter longer.
        ({"placement": Placement("hi", "hi-1")}, {}, [estimate("hi-1", 2.4), OUTSIDE], "hi-1 preferred"),
        ({"placement": Placement("hi", "hi-1")}, {}, [estimate("hi-1", 2.6), OUTSIDE], "gpt-1 spill"),
    ],
)
def test_what_concerns_the_request(
    changes: dict[str, Any], state: dict[str, Any], estimates: Sequence[LatencyEstimate], expected: str
) -> None:
    """Filters, faults and conversations."""
    assert chosen(*estimates, request=asking(**changes), now=NOW if "overloads" in state else 0.5, **state) == expected


def test_several_external_models() -> None:
    """In the order of the ladder, whatever the number of their requests."""
    rungs = (HI, CLAUDE, GPT)
    several = request(target=Target("smol", rungs, NO_FLOOR, pinned=False), rungs=rungs, prompt_tokens=100)
    both = estimate("claude-1", None, requests=40), OUTSIDE
    assert chosen(*both, request=several) == "claude-1 fallback"
    assert chosen(OUTSIDE, request=several) == "gpt-1 fallback"


@pytest.mark.parametrize(
    "target, rungs, expected",
    [
        (Target("gpt", (GPT,), NO_FLOOR, pinned=True), (GPT,), "gpt-1 pinned"),
        (Target("outside", (GPT,), NO_FLOOR, pinned=False), (GPT,), "gpt-1 preferred"),
        (ENDS_OUTSIDE, (GPT,), "gpt-1 floor"),
    ],
)
def test_nothing_else_may_answer(target: Target, rungs: tuple[Variant, ...], expected: str) -> None:
    """An alias may consist of an external model, and a client may pin it."""
    assert chosen(estimate("hi-1"), OUTSIDE, request=request(target=target, rungs=rungs)) == expected


@pytest.mark.parametrize(
    "floor, trust_declared, permitted",
    [
        (NO_FLOOR, False, ["hi", "lo", "gpt", "claude"]),
        (Floor(top1_agreement=0.85), True, ["hi", "lo", "gpt"]),
        (Floor(top1_agreement=0.85), False, ["hi", "lo"]),
        (Floor(top1_agreement=0.91), True, ["hi", "lo"]),
        (Floor(kl_mean=9.0), True, ["hi", "lo"]),
    ],
)
def test_never_above_a_floor_that_it_does_not_declare(floor: Floor, trust_declared: bool, permitted: list[str]) -> None:
    """Unknown quality meets no floor, and declared quality only where the alias trusts it."""
    rungs = (HI, LO, GPT, CLAUDE)
    target = Target("smol", rungs, floor, pinned=False, trust_declared=trust_declared)
    assert [rung.name for rung in target.permitted] == permitted


def test_its_speed_is_never_known() -> None:
    """Whatever was observed of it."""
    replica = Replica("gpt-external", "gpt", EXTERNAL, "", "openai/gpt-4.1", external=ExternalModel("openai/gpt-4.1"))
    profile = SpeedProfile((0.01,), (100.0,), 0.0001, None, 100.0)
    assert not estimate_latency(ReplicaMetrics(replica, speed=profile)).known
    plain = msgspec.structs.replace(ReplicaMetrics(Replica("hi-1", "hi", "bf16", "", "m"), speed=profile))
    assert estimate_latency(plain).known


# Properties

external_fleets = st.lists(
    st.builds(
        lambda each, name: msgspec.structs.replace(each, id=name, variant=name.partition("-")[0]),
        any_estimate,
        st.sampled_from(["gpt-0", "gpt-1", "claude-0"]),
    ),
    max_size=3,
    unique_by=lambda each: each.id,
)


@given(fleets, external_fleets, requests, states, ladders)
def test_replicas_answer_as_without_external_models(
    fleet: list[LatencyEstimate],
    outside: list[LatencyEstimate],
    any_request: RoutingRequest,
    state: dict[str, Any],
    rungs: tuple[Variant, ...],
) -> None:
    """Whatever a replica answers soon enough, it answers with external models below it, too, by the same gates."""
    plain = msgspec.structs.replace(any_request, rungs=rungs)
    extended = msgspec.structs.replace(any_request, rungs=(*rungs, GPT, CLAUDE))
    before = decide(plain, cluster(*fleet, **state), NOW)
    after = decide(extended, cluster(*fleet, *outside, **state), NOW)
    candidate = after.candidate
    if candidate is None or not candidate.variant.is_external:
        assert (candidate and candidate.replica.id) == (before.candidate and before.candidate.replica.id)
        assert after.gates == before.gates
        return
    first = before.candidate
    # Too slow, known to fail, too short a context, or nobody.
    assert (
        first is None
        or first.replica.wait_seconds > SPILL.after_seconds
        or first.replica.id in state["breakers"]
        or plain.needed_tokens > first.replica.context_tokens
    )


@given(fleets, external_fleets, requests, states, ladders, st.floats(0, 200))
def test_has_room_agrees_with_the_decision(
    fleet: list[LatencyEstimate],
    outside: list[LatencyEstimate],
    any_request: RoutingRequest,
    state: dict[str, Any],
    rungs: tuple[Variant, ...],
    now: float,
) -> None:
    """Where a queue sees room, its requests find someone; so no queue goes round in circles."""
    any_request = msgspec.structs.replace(any_request, rungs=(*rungs, GPT, CLAUDE), tried=NO_REPLICAS)
    state_now = cluster(*fleet, *outside, **state)
    context = shortest_fitting_context(any_request.rungs, state_now, any_request.needed_tokens, any_request.tools)
    room = has_room([rung.name for rung in any_request.rungs], state_now, now, context, any_request.tools)
    assert not room or decide(any_request, state_now, now).candidate is not None


@given(fleets, external_fleets, requests, states)
def test_an_explanation_tells_the_decision(
    fleet: list[LatencyEstimate], outside: list[LatencyEstimate], any_request: RoutingRequest, state: dict[str, Any]
) -> None:
    """It names the same replica, and says of each other one why not."""
    rungs = (*RUNGS, GPT, CLAUDE)
    target = Target("smol", rungs, NO_FLOOR, pinned=False, spill=SPILL)
    any_request = msgspec.structs.replace(any_request, target=target, rungs=rungs)
    state_now = cluster(*fleet, *outside, **state)
    candidate = decide(any_request, state_now, NOW).candidate
    explanation = explain(any_request, state_now, NOW)
    assert (explanation.chosen and explanation.chosen.replica) == (candidate and candidate.replica.id)
    assert explanation.because
    unexplained = [each.replica for each in explanation.candidates if not each.why_not]
    assert unexplained == ([explanation.chosen.replica] if explanation.chosen else [])


def test_an_explanation_says_why_a_model_outside_was_asked() -> None:
    """What each rung of replicas says; and that it is asked last."""
    asked = explain(asking(), cluster(estimate("hi-1", 9.0), OUTSIDE), NOW)
    assert asked.because == (
        "external: no replica can answer within spill.after_seconds (2); hi is too slow: its wait is 9.000 s; "
        "lo has no replica to ask"
    )
    assert [(each.replica, each.rank, each.why_not) for each in asked.candidates] == [
        ("gpt-1", 1, ""),
        ("hi-1", 2, "its rung is too slow: the wait of hi-1 is 9.000 s"),
    ]
    spared = explain(asking(), cluster(estimate("hi-1"), OUTSIDE), NOW)
    assert [each.why_not for each in spared.candidates] == [
        "",
        "external models are asked last: a replica answers soon enough",
    ]
    assert decision(estimate("hi-1"), OUTSIDE, request=asking()).gates == {}
