"""What waiting requests need to know: whether a replica will answer, and whether one has room now."""

from collections.abc import Iterable

from config.variant import Variant
from gateway.routing.cluster_state import ClusterState
from gateway.routing.filters import admitted, filter_replicas
from gateway.routing.pick import last_resorts, ready_replicas
from gateway.routing.request import NO_REPLICAS
from serving.replica import PENDING, ReplicaStatus, State

ANSWERING = PENDING | {State.READY}


def any_pending(variant_names: Iterable[str], snapshot: Iterable[ReplicaStatus]) -> bool:
    """Return whether a replica of these variants is starting."""
    names = frozenset(variant_names)
    return any(status.state in PENDING and not names.isdisjoint(status.replica.variants) for status in snapshot)


def unready_counts(variant_names: Iterable[str], snapshot: Iterable[ReplicaStatus]) -> str:
    """Describe replicas of which none is ready: how many are starting, have failed, or are stopping."""
    names = frozenset(variant_names)
    states = [status.state for status in snapshot if not names.isdisjoint(status.replica.variants)]
    counts = {
        "starting": sum(state in PENDING for state in states),
        "failed": sum(state is State.FAILED for state in states),
        "stopping": sum(state not in PENDING and state not in (State.FAILED, State.STOPPED) for state in states),
        "stopped": sum(state is State.STOPPED for state in states),
    }
    listed = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
    return f"{listed}, of {len(states)}" if states else "none is running"


def none_takes_tools(variant_names: Iterable[str], snapshot: Iterable[ReplicaStatus]) -> bool:
    """Return whether these variants have replicas, ready or starting, and all of them are known to take no tools."""
    names = frozenset(variant_names)
    answering = [each.replica for each in snapshot if each.state in ANSWERING]
    there = [replica for replica in answering if not names.isdisjoint(replica.variants)]
    return bool(there) and all(replica.tools is False for replica in there)


def shortest_fitting_context(
    rungs: Iterable[Variant], cluster: ClusterState, needed_tokens: float, tools: bool = False
) -> float:
    """Return the shortest context that a request fits in; 0 if it fits in all of them, or in none."""
    contexts = {each.context_tokens for each in ready_replicas(rungs, cluster, tools)}
    fitting = [tokens for tokens in contexts if tokens >= needed_tokens]
    return min(fitting) if 0 < len(fitting) < len(contexts) else 0.0


def has_room(
    variant_names: Iterable[str], cluster: ClusterState, now: float, needed_tokens: float = 0.0, tools: bool = False
) -> bool:
    """Return whether a replica of these variants, with a context that is long enough, takes one more such request."""
    names = tuple(variant_names)
    if needed_tokens:
        ready = [each for name in names for each in cluster.estimates(name)]
        contexts = [each.context_tokens for each in filter_replicas(ready, NO_REPLICAS, 0.0, tools)]
        needed_tokens = needed_tokens if contexts and needed_tokens <= max(contexts) else 0.0
    ready = [each for name in names for each in admitted(cluster.estimates(name), cluster, now)]
    able = filter_replicas(ready, NO_REPLICAS, needed_tokens, tools)
    barred = cluster.breakers or cluster.silent
    if not any(each.has_room for each in able) and barred:
        all_silent = all(each.id in cluster.silent for name in names for each in cluster.estimates(name))
        ready = [each for name in names for each in last_resorts(name, cluster, now, all_silent)]
        able = filter_replicas(ready, NO_REPLICAS, needed_tokens, tools)
    return any(each.has_room for each in able)
