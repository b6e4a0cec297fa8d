"""Which replica of a rung is best for a request: the one that answers soonest, all in all."""

from collections.abc import Sequence
from math import inf

from config.schema import Spill
from gateway.routing.cluster_state import Query
from gateway.routing.latency import LatencyEstimate, answer_length, seconds_for

# A conversation stays on its replica as long as no other one is so much cheaper.
LOYAL_SHARE = 1.1
LOYAL_SECONDS = 0.05


def able_to(outlooks: Sequence[LatencyEstimate], query: Query, needed: float) -> Sequence[LatencyEstimate]:
    """Leave out who failed this request already, and whose context is too short for it."""
    tried = query.tried
    return [each for each in outlooks if needed <= each.context_tokens and each.id not in tried]


def best_of(able: Sequence[LatencyEstimate], query: Query, spill: Spill) -> LatencyEstimate | None:
    """The cheapest replica, or one that is soon enough and costs hardly more."""
    found = cheapest(able, query)
    if found is None or not found.known or found.wait_seconds <= spill.after_seconds:
        return found
    soon = cheapest([each for each in able if each.wait_seconds <= spill.after_seconds], query)
    if soon is None or cost_of(soon, query) > cost_of(found, query) + spill.after_seconds:
        return found
    return soon


def cheapest(able: Sequence[LatencyEstimate], query: Query) -> LatencyEstimate | None:
    """The replica that would answer soonest; the shortest queue where that isn't known of all of them."""
    ask, cached = query.ask, query.cached_tokens
    count = len(able)
    first = query.turn % count if count > 1 else 0
    answer_tokens = answer_length(able[0], ask) if count else 0.0
    chosen, lowest, home, home_seconds = None, inf, None, inf
    sticky = query.stay.replica_id if query.stay is not None and not query.stay.running else None
    for outlook in (*able[first:], *able[:first]) if first else able:
        if not outlook.has_room:
            continue
        if not outlook.known:
            return shortest(able, query.turn)
        seconds = seconds_for(outlook, ask, answer_tokens, cached.get(outlook.id, 0.0) if cached else 0.0)
        if seconds < lowest:
            chosen, lowest = outlook, seconds
        if outlook.id == sticky:
            home, home_seconds = outlook, seconds
    return home if home is not None and home_seconds <= LOYAL_SHARE * lowest + LOYAL_SECONDS else chosen


def shortest(able: Sequence[LatencyEstimate], turn: int) -> LatencyEstimate | None:
    """The replica with the fewest requests."""
    count = len(able)
    chosen = None
    for place in range(count):
        outlook = able[(place + turn) % count]
        if outlook.has_room and (chosen is None or outlook.requests < chosen.requests):
            chosen = outlook
    return chosen


def cost_of(outlook: LatencyEstimate, query: Query) -> float:
    """What a request costs on a replica, in seconds."""
    ask = query.ask
    return seconds_for(outlook, ask, answer_length(outlook, ask), query.cached_tokens.get(outlook.id, 0.0))
