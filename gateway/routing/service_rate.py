"""How soon a line empties: the pace of answers, and what a client that is refused is told of it.

Fed only while somebody waits (`resumed` when the first one joins, `finished` at each answer's end), a pace is what
the replicas can do; fed all the time, it is what they are asked for, and falls with demand.
"""

from dataclasses import dataclass
from math import exp2, log

from gateway.errors import MAX_RETRY_AFTER_SECONDS

HALF_LIFE_SECONDS = 10
SHORTEST_RETRY_SECONDS = 1
# Where nothing has finished yet.
UNKNOWN_RETRY_SECONDS = 5

# Answers that end together when a pace begins are no faster than this many seconds allow.
_LEAST_SPAN_SECONDS = 1


@dataclass(frozen=True, slots=True)
class ServiceRate:
    """Answers finished, each worth half as much after every half-life; times on the monotonic clock."""

    since: float
    at: float
    weight: float = 0

    def per_second(self, now: float) -> float:
        """Answers finished in a second, lately; silence makes it less."""
        weight = self.weight * _left(now - self.at)
        # How much a steady one in a second would weigh after so long.
        full = (1 - _left(max(now - self.since, _LEAST_SPAN_SECONDS))) * HALF_LIFE_SECONDS / log(2)
        return weight / full


def finished(pace: ServiceRate | None, now: float) -> ServiceRate:
    """Count an answer's end; where there was no pace, it only starts the clock."""
    if pace is None:
        return ServiceRate(now, now)
    return ServiceRate(pace.since, now, pace.weight * _left(now - pace.at) + 1)


def resumed(pace: ServiceRate | None, now: float) -> ServiceRate:
    """Go on after idleness: nothing could finish, so the silence since the last end says nothing."""
    if pace is None:
        return ServiceRate(now, now)
    return ServiceRate(pace.since + (now - pace.at), now, pace.weight)


def retry_after_seconds(waiting_ahead: int, pace: ServiceRate | None, now: float) -> float:
    """Expect when it would be the turn of a request with so many ahead of it, within what clients obey."""
    if pace is None or pace.weight == 0:
        return UNKNOWN_RETRY_SECONDS
    per_second = pace.per_second(now)
    if waiting_ahead + 1 >= MAX_RETRY_AFTER_SECONDS * per_second:
        return MAX_RETRY_AFTER_SECONDS
    return bounded((waiting_ahead + 1) / per_second)


def bounded(seconds: float) -> float:
    """Keep within what clients obey."""
    return min(max(seconds, SHORTEST_RETRY_SECONDS), MAX_RETRY_AFTER_SECONDS)


def _left(seconds: float) -> float:
    """What is left of one after so long."""
    return exp2(-seconds / HALF_LIFE_SECONDS)
