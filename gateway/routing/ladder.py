"""Which replica answers: the least loaded one of the highest rung that may answer and has room."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from config.variant import Variant
from gateway.routing.breaker import Breaker, admissible
from gateway.routing.catalog import Target
from gateway.routing.shedding import ROOMY, Mark
from serving.replica import HOPEFUL, Replica, ReplicaStatus

Reason = Literal["preferred", "spill", "floor", "pinned", "canary", "fallback"]


class Choice(msgspec.Struct, frozen=True):
    """One replica that may answer, and why it is its turn."""

    replica: Replica
    variant: Variant
    reason: Reason


@dataclass(frozen=True, slots=True)
class Scene:
    """What a decision is made on: who is ready, how busy, and what is held against whom; who fails, who is full."""

    ready: Mapping[str, tuple[Replica, ...]]  # by variant
    in_flight: Mapping[str, int]
    breakers: Mapping[str, Breaker] = field(default_factory=dict)
    marks: Mapping[str, Mark] = field(default_factory=dict)

    def has_room(self, replica: Replica, now: float) -> bool:
        """Tell whether a replica takes one more request."""
        in_flight = self.in_flight.get(replica.id, 0)
        if in_flight >= replica.max_in_flight:
            return False
        mark = self.marks.get(replica.id, ROOMY) if self.marks else ROOMY
        return mark is ROOMY or (in_flight < mark.most and not mark.full(now))


def best(
    target: Target, rungs: tuple[Variant, ...], scene: Scene, tried: frozenset[str], turn: int, now: float
) -> Choice | None:
    """Choose a replica, None if none has room; `turn` rotates among equals.

    Replicas that their breakers bar come last, below every rung: only when all others have failed, or are full.
    """
    last_resort: list[tuple[Variant, list[Replica]]] = []
    for variant in rungs:
        ready = scene.ready.get(variant.name, ())
        first: Sequence[Replica] = ready
        if scene.breakers:
            admitted = admissible([replica.id for replica in ready], scene.breakers, now)
            first = _named(ready, admitted.first)
            last_resort.append((variant, _named(ready, admitted.last_resort)))
        replica = _least_loaded(first, scene, tried, turn, now)
        if replica is not None:
            return Choice(replica, variant, _reason(target, variant, rungs))
    for variant, replicas in last_resort:
        replica = _least_loaded(replicas, scene, tried, turn, now)
        if replica is not None:
            return Choice(replica, variant, _reason(target, variant, rungs))
    return None


def ranked(
    target: Target, rungs: tuple[Variant, ...], scene: Scene, tried: frozenset[str], turn: int, now: float
) -> Iterator[Choice]:
    """Every replica that has room, in the order in which they would be tried."""
    while (choice := best(target, rungs, scene, tried, turn, now)) is not None:
        yield choice
        tried |= {choice.replica.id}


def worth_waiting(rungs: tuple[Variant, ...], snapshot: Iterable[ReplicaStatus]) -> bool:
    """Tell whether a replica that may answer is on its way."""
    names = {variant.name for variant in rungs}
    return any(status.state in HOPEFUL and status.replica.variant in names for status in snapshot)


def _least_loaded(
    replicas: Sequence[Replica], scene: Scene, tried: frozenset[str], turn: int, now: float
) -> Replica | None:
    chosen, lowest = None, 0
    in_flight = scene.in_flight
    count = len(replicas)
    for place in range(count):
        replica = replicas[(place + turn) % count]
        load = in_flight.get(replica.id, 0)
        if (chosen is None or load < lowest) and replica.id not in tried and scene.has_room(replica, now):
            chosen, lowest = replica, load
    return chosen


def _named(replicas: Sequence[Replica], ids: Sequence[str]) -> list[Replica]:
    return [replica for replica in replicas if replica.id in ids]


def _reason(target: Target, variant: Variant, rungs: tuple[Variant, ...]) -> Reason:
    if target.pinned:
        return "pinned"
    if variant is rungs[0]:
        # The best that the caller lets answer; `floor` if the caller or the alias ruled a better rung out.
        return "preferred" if rungs[0] is target.rungs[0] else "floor"
    return "fallback"
