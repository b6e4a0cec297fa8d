"""What a decision is made on: one request that wants a replica, and how replicas fare."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from gateway.routing.breaker import Breaker, admissible
from gateway.routing.latency import LatencyEstimate
from gateway.routing.overload import NOT_OVERLOADED, Overload
from gateway.routing.request import NOTHING_KNOWN, Ask
from gateway.routing.sessions import Placement
from gateway.routing.spill import SpillGate

GateName = tuple[str, str]  # an alias, and the variant of a rung

NOBODY: frozenset[str] = frozenset()
NOTHING_CACHED: Mapping[str, float] = {}


class Query(msgspec.Struct, frozen=True, gc=False):
    """One request that wants a replica, once more perhaps.

    `turn` rotates among equals, `tried` have failed it, `stay` is where its conversation was, and `cached_tokens` is
    how much of its prompt replicas have probably read already.
    """

    ask: Ask = NOTHING_KNOWN
    turn: int = 0
    tried: frozenset[str] = NOBODY
    stay: Placement | None = None
    cached_tokens: Mapping[str, float] = NOTHING_CACHED


@dataclass(frozen=True, slots=True)
class ClusterState:
    """What a decision is made on: how replicas fare, who fails, who is full, which rungs spill."""

    outlooks: Callable[[str], Sequence[LatencyEstimate]]  # of a variant's ready replicas
    breakers: Mapping[str, Breaker] = field(default_factory=dict)
    marks: Mapping[str, Overload] = field(default_factory=dict)
    gates: Mapping[GateName, SpillGate] = field(default_factory=dict)


def admitted(outlooks: Sequence[LatencyEstimate], scene: ClusterState, now: float) -> Sequence[LatencyEstimate]:
    """Leave out whom a breaker bars, and whoever said that it is full."""
    if scene.breakers:
        first = admissible([each.id for each in outlooks], scene.breakers, now).first
        outlooks = [each for each in outlooks if each.id in first]
    return with_room(outlooks, scene, now)


def with_room(outlooks: Sequence[LatencyEstimate], scene: ClusterState, now: float) -> Sequence[LatencyEstimate]:
    """Have those that said that they are full show no room."""
    if not scene.marks:
        return outlooks
    marks = scene.marks
    return [msgspec.structs.replace(each, has_room=False) if is_full(each, marks, now) else each for each in outlooks]


def is_full(outlook: LatencyEstimate, marks: Mapping[str, Overload], now: float) -> bool:
    """Tell whether a replica said that it takes no more."""
    mark = marks.get(outlook.id, NOT_OVERLOADED)
    return mark is not NOT_OVERLOADED and (mark.full(now) or outlook.in_flight >= mark.most)
