"""Filter: which variants of a ladder may answer a request at all, and which replicas of a rung can be asked now.

A variant is rejected by a floor, by the precisions that the caller accepts, or by its own failed evaluation. A replica
is filtered out by its silence, by an open breaker, by an earlier failure of the same request, by a context that is too
short, or by the request's tools.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from config.schema import Floor
from config.variant import Variant
from gateway.routing.breaker import in_rotation
from gateway.routing.cluster_state import ClusterState
from gateway.routing.latency import LatencyEstimate
from gateway.routing.overload import NOT_OVERLOADED, Overload

# Variants of a ladder

Check = Callable[[Variant], str | None]


@dataclass(frozen=True, slots=True)
class Rejection:
    """A variant that may not answer."""

    variant: Variant
    why: str

    def __str__(self) -> str:
        return f"{self.variant.name}: {self.why}"


@dataclass(frozen=True, slots=True)
class FilterResult:
    """A ladder in two: the variants that may answer, in their order, and those that may not."""

    permitted: tuple[Variant, ...]
    rejected: tuple[Rejection, ...]


def filter_failed(ladder: Iterable[Variant]) -> FilterResult:
    """Reject the variants whose own evaluation failed."""

    def why(variant: Variant) -> str | None:
        return None if variant.failure is None else f"{variant.failure} (an alias can take it: admit_failed)"

    return _filter(ladder, why)


def filter_rungs(
    rungs: Iterable[Variant], floors: Sequence[Floor], precisions: frozenset[str] | None, *, trust_declared: bool
) -> FilterResult:
    """Reject variants that miss a floor, or whose precision is not accepted; None accepts every precision."""

    def why(variant: Variant) -> str | None:
        if precisions is not None and variant.precision not in precisions:
            return f"precision {variant.precision} was not asked for"
        shortfalls = (variant.quality.shortfall(floor, trust_declared=trust_declared) for floor in floors)
        return next(filter(None, shortfalls), None)

    return _filter(rungs, why)


def _filter(rungs: Iterable[Variant], check: Check) -> FilterResult:
    permitted, rejected = [], []
    for rung in rungs:
        why = check(rung)
        if why is None:
            permitted.append(rung)
        else:
            rejected.append(Rejection(rung, why))
    return FilterResult(tuple(permitted), tuple(rejected))


# Replicas of a rung


def filter_replicas(
    estimates: Sequence[LatencyEstimate], tried: frozenset[str], needed_tokens: float, tools: bool = False
) -> Sequence[LatencyEstimate]:
    """Keep the replicas that have not failed this request, whose context is long enough, and that take its `tools`."""
    if tried:
        estimates = [each for each in estimates if each.id not in tried]
    if tools:
        estimates = [each for each in estimates if each.tools]
    return [each for each in estimates if needed_tokens <= each.context_tokens]


def admitted(estimates: Sequence[LatencyEstimate], cluster: ClusterState, now: float) -> Sequence[LatencyEstimate]:
    """Keep the replicas that are responsive and that no breaker bars; those that are overloaded show no room."""
    if cluster.silent:
        estimates = [each for each in estimates if each.id not in cluster.silent]
    if cluster.breakers:
        rotation = in_rotation([each.id for each in estimates], cluster.breakers, now)
        estimates = [each for each in estimates if each.id in rotation]
    return without_room_if_overloaded(estimates, cluster, now) if cluster.overloads else estimates


def without_room_if_overloaded(
    estimates: Sequence[LatencyEstimate], cluster: ClusterState, now: float
) -> Sequence[LatencyEstimate]:
    """Give overloaded replicas no room."""
    overloads = cluster.overloads
    return [
        msgspec.structs.replace(each, has_room=False) if is_overloaded(each, overloads, now) else each
        for each in estimates
    ]


def is_overloaded(estimate: LatencyEstimate, overloads: Mapping[str, Overload], now: float) -> bool:
    """Return whether a replica has refused requests lately, and is still to be spared."""
    overload = overloads.get(estimate.id, NOT_OVERLOADED)
    return overload is not NOT_OVERLOADED and (overload.active(now) or estimate.in_flight >= overload.limit)
