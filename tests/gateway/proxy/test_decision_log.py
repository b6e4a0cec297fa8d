"""The latest decisions, as they were made."""

import msgspec

from config.schema import NO_FLOOR
from config.variant import QualityMeasures, Variant
from gateway.proxy.decision_log import DecisionLog
from gateway.proxy.leases import Want
from gateway.routing.breaker import Breaker
from gateway.routing.cluster_state import ClusterState, GateName, Query
from gateway.routing.latency import LatencyEstimate, ReplicaMetrics, estimate_latency
from gateway.routing.overload import Overload
from gateway.routing.pick import Decision
from gateway.routing.spill import SpillGate
from gateway.routing.target import Target
from serving.replica import Replica

HI = Variant("hi", "bf16", QualityMeasures("measured", 0.0, 1.0, 1.0))
TARGET = Target("smol", (HI,), NO_FLOOR, pinned=False)
IDLE = estimate_latency(ReplicaMetrics(Replica("hi-1", "hi", "bf16", "http://hi-1", "m1")))
NOBODY = Decision(None, {})


def want(request_id: str) -> Want:
    """A request by its id."""
    return Want(TARGET, (HI,), 0, request_id=request_id)


def test_what_a_decision_was_made_on_stays_as_it_was() -> None:
    """Whatever becomes of the replicas, the breakers, the marks and the gates; without gates of others."""
    outlooks: list[LatencyEstimate] = [IDLE]
    breakers: dict[str, Breaker] = {"hi-1": Breaker()}
    marks: dict[str, Overload] = {"hi-1": Overload()}
    gates: dict[GateName, SpillGate] = {("smol", "hi"): SpillGate(), ("else", "hi"): SpillGate()}
    decisions, query = DecisionLog(), Query(turn=5)
    decisions.made(want("r"), query, ClusterState(lambda _: outlooks, breakers, marks, gates), NOBODY, 9.0, 30.0)
    outlooks[0] = msgspec.structs.replace(IDLE, in_flight=1)
    for each in (breakers, marks, gates):
        each.clear()
    made = decisions.find("r")
    assert made is not None
    assert (made.query, made.at_seconds, made.decision, made.patience_seconds) == (query, 9.0, NOBODY, 30.0)
    assert made.outlooks == {"hi": (IDLE,)}
    assert (set(made.breakers), set(made.marks)) == ({"hi-1"}, {"hi-1"})
    assert made.gates == {("smol", "hi"): SpillGate()}


def test_the_latest_are_kept_and_of_a_request_the_last_one() -> None:
    """A request that is decided on once more is young again."""
    decisions, scene = DecisionLog(most=2), ClusterState(lambda _: ())
    for now, name in enumerate(("a", "b", "a", "c")):
        decisions.made(want(name), Query(), scene, NOBODY, float(now), 1.0)
    found = {name: made.at_seconds for name in "abc" if (made := decisions.find(name)) is not None}
    assert found == {"a": 2.0, "c": 3.0}
