"""Which replica answers: the least loaded ready one of the highest rung that may answer and is there."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from config.schema import Floor
from config.variant import Variant
from gateway.errors import FloorUnmet
from gateway.routing.catalog import Target
from serving.replica import HOPEFUL, Replica, ReplicaStatus, State

Reason = Literal["preferred", "spill", "floor", "pinned", "canary", "fallback"]


@dataclass(frozen=True, slots=True)
class Choice:
    """One replica that may answer, and why it is its turn."""

    replica: Replica
    variant: Variant
    reason: Reason


def permitted_rungs(target: Target, floor: Floor, precisions: frozenset[str] | None) -> tuple[Variant, ...]:
    """Keep the rungs that satisfy alias and caller; FloorUnmet tells for each of the others why not."""
    kept, refused = [], []
    for variant in target.rungs:
        why = variant.quality.shortfall(target.floor) or variant.quality.shortfall(floor)
        if precisions is not None and variant.precision not in precisions:
            why = f"precision {variant.precision} was not asked for"
        if why is None:
            kept.append(variant)
        else:
            refused.append(f"{variant.name}: {why}")
    if not kept:
        raise FloorUnmet(f"no variant of {target.name!r} is good enough ({'; '.join(refused)})", param="model")
    return tuple(kept)


def rank(
    target: Target, rungs: tuple[Variant, ...], snapshot: Iterable[ReplicaStatus], tried: frozenset[str], turn: int
) -> list[Choice]:
    """Order the ready replicas, best first: by rung, then by load; `turn` rotates among equals."""
    ready = [status for status in snapshot if status.state is State.READY and status.replica.id not in tried]
    choices = []
    for variant in rungs:
        here = [status for status in ready if status.replica.variant == variant.name]
        shift = turn % len(here) if here else 0
        rotated = here[shift:] + here[:shift]
        reason = _reason(target, variant, rungs)
        ordered = sorted(rotated, key=lambda status: status.in_flight)
        choices += [Choice(status.replica, variant, reason) for status in ordered]
    return choices


def worth_waiting(rungs: tuple[Variant, ...], snapshot: Iterable[ReplicaStatus]) -> bool:
    """Tell whether a replica that may answer is on its way."""
    names = {variant.name for variant in rungs}
    return any(status.state in HOPEFUL and status.replica.variant in names for status in snapshot)


def _reason(target: Target, variant: Variant, rungs: tuple[Variant, ...]) -> Reason:
    if target.pinned:
        return "pinned"
    if variant is rungs[0]:
        # The best that the caller lets answer; `floor` if the caller or the alias ruled a better rung out.
        return "preferred" if rungs[0] is target.rungs[0] else "floor"
    return "fallback"
