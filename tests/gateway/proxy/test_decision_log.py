"""The latest decisions, each with the state that it was made on."""

import msgspec

from config.schema import NO_FLOOR
from config.variant import QualityMeasures, Variant
from gateway.proxy.decision_log import DecisionLog
from gateway.routing.breaker import Breaker
from gateway.routing.cluster_state import ClusterState
from gateway.routing.latency import LatencyEstimate, ReplicaMetrics, estimate_latency
from gateway.routing.overload import Overload
from gateway.routing.pick import Decision
from gateway.routing.request import RoutingRequest
from gateway.routing.spill import RungKey, SpillGate
from gateway.routing.target import Target
from serving.replica import Replica

HI = Variant("hi", "bf16", QualityMeasures("measured", 0.0, 1.0, 1.0))
TARGET = Target("smol", (HI,), NO_FLOOR, pinned=False)
IDLE = estimate_latency(ReplicaMetrics(Replica("hi-1", "hi", "bf16", "http://hi-1", "m1")))
NO_CANDIDATE = Decision(None, {})


def request(request_id: str, turn: int = 0) -> RoutingRequest:
    """A request with an id."""
    return RoutingRequest(TARGET, TARGET.rungs, turn, request_id)


def test_the_state_of_a_decision_does_not_change() -> None:
    """Later changes of estimates, breakers, overloads and gates leave it as it was; it has only gates of its alias."""
    estimates: list[LatencyEstimate] = [IDLE]
    breakers: dict[str, Breaker] = {"hi-1": Breaker()}
    overloads: dict[str, Overload] = {"hi-1": Overload()}
    gates: dict[RungKey, SpillGate] = {("smol", "hi"): SpillGate(), ("else", "hi"): SpillGate()}
    decisions, routed = DecisionLog(), request("r", turn=5)
    cluster = ClusterState(lambda _: estimates, breakers, overloads, gates)
    decisions.append(routed, cluster, NO_CANDIDATE, 9.0, 30.0)
    estimates[0] = msgspec.structs.replace(IDLE, in_flight=1)
    for each in (breakers, overloads, gates):
        each.clear()
    record = decisions.find("r")
    assert record is not None
    assert record.request is routed
    assert (record.decided_at, record.decision, record.wait_seconds) == (9.0, NO_CANDIDATE, 30.0)
    assert record.estimates == ((IDLE,),)
    assert (set(record.breakers), set(record.overloads)) == ({"hi-1"}, {"hi-1"})
    assert record.gates == {("smol", "hi"): SpillGate()}
    snapshot = record.snapshot(10.0)
    assert snapshot.estimates == {"hi": (IDLE,)}
    assert snapshot.request is not None
    assert (snapshot.request.turn, snapshot.request.chosen, snapshot.request.wait_seconds) == (5, None, 30.0)


def test_the_latest_decisions_are_kept() -> None:
    """Of a request with several decisions the latest is found."""
    decisions, cluster = DecisionLog(limit=2), ClusterState(lambda _: ())
    for now, name in enumerate(("a", "b", "a", "c")):
        decisions.append(request(name), cluster, NO_CANDIDATE, float(now), 1.0)
    found = {name: record.decided_at for name in "abc" if (record := decisions.find(name)) is not None}
    assert found == {"a": 2.0, "c": 3.0}
