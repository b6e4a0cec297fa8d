"""The latest decisions, with all that they were made on, for whoever asks why."""

from collections import OrderedDict
from collections.abc import Mapping

import msgspec

from gateway.relay.leases import Want
from gateway.routing.breaker import Breaker
from gateway.routing.gates import Gate
from gateway.routing.ladder import Decision
from gateway.routing.outlook import Outlook
from gateway.routing.scene import GateName, Query, Scene
from gateway.routing.shedding import Mark

MOST_DECISIONS = 1000
NO_BREAKERS: Mapping[str, Breaker] = {}
NO_MARKS: Mapping[str, Mark] = {}


class Made(msgspec.Struct, frozen=True, eq=False):
    """One decision, and the scene as it was then; `at_seconds` is on the monotonic clock."""

    want: Want
    query: Query
    at_seconds: float
    outlooks: Mapping[str, tuple[Outlook, ...]]
    breakers: Mapping[str, Breaker]
    marks: Mapping[str, Mark]
    gates: Mapping[GateName, Gate]
    decision: Decision
    patience_seconds: float


class Decisions:
    """Keeps so many decisions, the latest of each request."""

    def __init__(self, most: int = MOST_DECISIONS) -> None:
        self._most = most
        self._made: OrderedDict[str, Made] = OrderedDict()

    def made(
        self, want: Want, query: Query, scene: Scene, decision: Decision, now: float, patience_seconds: float
    ) -> None:
        """Keep a decision; what it was made on must be as it was."""
        kept, request_id, alias = self._made, want.request_id, want.target.name
        outlooks: dict[str, tuple[Outlook, ...]] = {}
        gates: dict[GateName, Gate] = {}
        for rung in want.rungs:
            outlooks[rung.name] = tuple(scene.outlooks(rung.name))
            if scene.gates and (gate := scene.gates.get((alias, rung.name))) is not None:
                gates[alias, rung.name] = gate
        breakers = dict(scene.breakers) if scene.breakers else NO_BREAKERS
        marks = dict(scene.marks) if scene.marks else NO_MARKS
        kept[request_id] = Made(want, query, now, outlooks, breakers, marks, gates, decision, patience_seconds)
        kept.move_to_end(request_id)
        if len(kept) > self._most:
            kept.popitem(last=False)

    def find(self, request_id: str) -> Made | None:
        """The latest decision for a request; None if it is too long ago, or never was."""
        return self._made.get(request_id)
