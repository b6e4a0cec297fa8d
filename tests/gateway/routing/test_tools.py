"""Requests with tools among replicas of which some take none."""

from typing import Any

import pytest
from hypothesis import given

from gateway.routing.explain import explain
from gateway.routing.latency import LatencyEstimate
from gateway.routing.pick import decide
from gateway.routing.request import RoutingRequest
from gateway.routing.waiting import has_room, none_takes_tools
from serving.replica import Replica, ReplicaStatus, State
from tests.gateway.routing.clusters import NOW, chosen, cluster, estimate, fleets, opened, request, requests, states

TOOLS = request(prompt_tokens=100, tools=True)
PLAIN_ONLY = estimate("hi-1", tools=False)


@pytest.mark.parametrize(
    "others, expected",
    [
        ((), None),
        ((estimate("hi-2"),), "hi-2 preferred"),
        ((estimate("hi-2", has_room=False),), None),
        ((estimate("mid-1"),), "mid-1 fallback"),
        ((estimate("mid-1", tools=False), estimate("lo-1")), "lo-1 fallback"),
        ((estimate("hi-2", context_tokens=50.0),), "hi-2 preferred"),
    ],
)
def test_the_choice(others: tuple[LatencyEstimate, ...], expected: str | None) -> None:
    """A replica that takes none is passed over, however idle; a context that is too short is the engine's to refuse."""
    assert chosen(PLAIN_ONLY, *others, request=TOOLS) == expected
    assert chosen(PLAIN_ONLY, *others) == "hi-1 preferred"


@given(fleets, requests, states)
def test_no_other_replica_is_ever_chosen(fleet: list[LatencyEstimate], any_request: RoutingRequest, state: Any) -> None:
    """In no state does a request with tools get to a replica that takes none."""
    candidate = decide(any_request, cluster(*fleet, **state), NOW).candidate
    assert candidate is None or candidate.replica.tools or not any_request.tools


def test_room_for_waiting_requests() -> None:
    """A queue of requests with tools has no room at replicas that take none, not even behind their breakers."""
    barred = cluster(PLAIN_ONLY, breakers={"hi-1": opened()})
    for state in (cluster(PLAIN_ONLY), barred):
        assert has_room(("hi",), state, NOW)
        assert not has_room(("hi",), state, NOW, tools=True)
    assert has_room(("hi",), cluster(PLAIN_ONLY, estimate("hi-2")), NOW, tools=True)


def test_the_explanation() -> None:
    """It says of such a replica why it wasn't asked."""
    explained = explain(TOOLS, cluster(PLAIN_ONLY, estimate("hi-2")), NOW)
    assert {each.replica: each.why_not for each in explained.candidates} == {"hi-1": "it takes no tools", "hi-2": ""}


@pytest.mark.parametrize(
    "replicas, expected",
    [
        ([], False),
        ([("hi", False, State.READY)], True),
        ([("hi", False, State.READY), ("hi", True, State.READY)], False),
        ([("hi", False, State.READY), ("hi", None, State.STARTING)], False),
        ([("hi", False, State.READY), ("hi", None, State.FAILED)], True),
        ([("hi", False, State.FAILED)], False),
        ([("hi", False, State.READY), ("lo", True, State.READY)], True),
    ],
)
def test_nobody_takes_tools(replicas: list[tuple[str, bool | None, State]], expected: bool) -> None:
    """Only replicas of these variants count that are ready or starting, and none if any may take tools."""
    snapshot = [
        ReplicaStatus(Replica(f"{variant}-{number}", variant, "any", "http://x", "m1", tools=tools), state, "", 0.0, 0)
        for number, (variant, tools, state) in enumerate(replicas)
    ]
    assert none_takes_tools(("hi",), snapshot) is expected
