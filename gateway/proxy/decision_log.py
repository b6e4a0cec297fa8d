"""The latest decisions, with all that they were made on, for whoever asks why."""

from collections import deque
from collections.abc import Mapping

import msgspec

from gateway.proxy.leases import Want
from gateway.routing.breaker import Breaker
from gateway.routing.cluster_state import ClusterState, GateName, Query
from gateway.routing.latency import LatencyEstimate
from gateway.routing.overload import Overload
from gateway.routing.pick import Decision
from gateway.routing.spill import SpillGate

MAX_DECISIONS = 1000
NO_BREAKERS: Mapping[str, Breaker] = {}
NO_MARKS: Mapping[str, Overload] = {}
NO_GATES: Mapping[GateName, SpillGate] = {}


class DecisionRecord(msgspec.Struct, frozen=True, eq=False, gc=False):
    """One decision, and the scene as it was then; `at_seconds` is on the monotonic clock.

    `replicas` are of the rungs that the request might be answered on, one after the other.
    """

    want: Want
    query: Query
    at_seconds: float
    replicas: tuple[tuple[LatencyEstimate, ...], ...]
    breakers: Mapping[str, Breaker]
    marks: Mapping[str, Overload]
    gates: Mapping[GateName, SpillGate]
    decision: Decision
    patience_seconds: float

    @property
    def outlooks(self) -> Mapping[str, tuple[LatencyEstimate, ...]]:
        """The replicas, by variant."""
        return dict(zip([rung.name for rung in self.want.rungs], self.replicas, strict=True))


class DecisionLog:
    """Keeps so many decisions; a request may have several."""

    def __init__(self, most: int = MAX_DECISIONS) -> None:
        self._made: deque[DecisionRecord] = deque(maxlen=most)

    def made(
        self, want: Want, query: Query, scene: ClusterState, decision: Decision, now: float, patience_seconds: float
    ) -> None:
        """Keep a decision; what it was made on must be as it was."""
        replicas = tuple([tuple(scene.outlooks(rung.name)) for rung in want.rungs])
        breakers = dict(scene.breakers) if scene.breakers else NO_BREAKERS
        marks = dict(scene.marks) if scene.marks else NO_MARKS
        gates = _gates_of(want, scene) if scene.gates else NO_GATES
        self._made.append(
            DecisionRecord(want, query, now, replicas, breakers, marks, gates, decision, patience_seconds)
        )

    def find(self, request_id: str) -> DecisionRecord | None:
        """The latest decision for a request; None if it is too long ago, or never was."""
        return next((made for made in reversed(self._made) if made.want.request_id == request_id), None)


def _gates_of(want: Want, scene: ClusterState) -> Mapping[GateName, SpillGate]:
    names = [(want.target.name, rung.name) for rung in want.rungs]
    return {name: scene.gates[name] for name in names if name in scene.gates}
