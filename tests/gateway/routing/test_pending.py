"""Replicas that are not ready: whether one may become ready, and how they are counted."""

import pytest

from gateway.routing.waiting import any_pending, unready_counts
from serving.replica import Replica, ReplicaStatus, State
from tests.gateway.routing.clusters import HI, LO, RUNGS


@pytest.mark.parametrize("state", State)
def test_any_pending(state: State) -> None:
    """A replica of a permitted variant is pending while it is starting or warming up."""
    pending = state in (State.STARTING, State.WARMING)
    status = ReplicaStatus(Replica("lo-1", "lo", "any", "http://lo-1", "m1"), state, "", 0.0, 0)
    assert any_pending([rung.name for rung in RUNGS], [status]) is pending
    assert not any_pending([HI.name], [status])


@pytest.mark.parametrize(
    "states, words",
    [
        ([State.STARTING, State.WARMING, State.FAILED], "2 starting, 1 failed, of 3"),
        ([State.FAILED, State.FAILED], "2 failed, of 2"),
        ([State.STARTING, State.DRAINING, State.STOPPED], "1 starting, 1 stopping, 1 stopped, of 3"),
        ([], "none is running"),
    ],
)
def test_unready_counts(states: list[State], words: str) -> None:
    """A client is told how many replicas of its variants are starting, and how many are not."""
    snapshot = [
        ReplicaStatus(Replica(f"lo-{number}", "lo", "any", "http://lo", "m1"), state, "", 0.0, 0)
        for number, state in enumerate(states)
    ]
    other = ReplicaStatus(Replica("odd-1", "odd", "any", "http://odd", "m1"), State.STARTING, "", 0.0, 0)
    assert unready_counts([LO.name], [*snapshot, other]) == words
