"""The rate at which replicas finish answers, and the Retry-After of rejected requests that follows from it.

If updated only while requests wait (`resumed` when the first one joins, `finished` when an answer ends), the rate is
the capacity of the replicas. If updated always, it is the demand, and falls when demand does.
"""

from dataclasses import dataclass
from math import exp2, log

from gateway.errors import MAX_RETRY_AFTER_SECONDS

HALF_LIFE_SECONDS = 10
MIN_RETRY_AFTER_SECONDS = 1
DEFAULT_RETRY_AFTER_SECONDS = 5  # while the rate is unknown

# Answers that end together right after the start count as a rate over at least this time.
_MIN_SPAN_SECONDS = 1


@dataclass(frozen=True, slots=True)
class ServiceRate:
    """An exponentially decaying count of finished answers; times are on the monotonic clock.

    `weight` is the count at `updated_at`: an answer counts half after each half-life. Counting began at `started_at`.
    """

    started_at: float
    updated_at: float
    weight: float = 0

    def per_second(self, now: float) -> float:
        """Answers finished per second; it falls while none ends."""
        weight = self.weight * _decay(now - self.updated_at)
        # The weight that one answer per second would have reached since the start.
        unit_weight = (1 - _decay(max(now - self.started_at, _MIN_SPAN_SECONDS))) * HALF_LIFE_SECONDS / log(2)
        return weight / unit_weight


def finished(rate: ServiceRate | None, now: float) -> ServiceRate:
    """Count the end of an answer; the first one (`rate` is None) only starts the clock."""
    if rate is None:
        return ServiceRate(now, now)
    return ServiceRate(rate.started_at, now, rate.weight * _decay(now - rate.updated_at) + 1)


def resumed(rate: ServiceRate | None, now: float) -> ServiceRate:
    """Exclude the time since the last update: no request waited, so no end of an answer was counted."""
    if rate is None:
        return ServiceRate(now, now)
    return ServiceRate(rate.started_at + (now - rate.updated_at), now, rate.weight)


def retry_after_seconds(waiting_ahead: int, rate: ServiceRate | None, now: float) -> float:
    """The expected wait of a request behind `waiting_ahead` others, from 1 second to MAX_RETRY_AFTER_SECONDS."""
    if rate is None or rate.weight == 0:
        return DEFAULT_RETRY_AFTER_SECONDS
    per_second = rate.per_second(now)
    if waiting_ahead + 1 >= MAX_RETRY_AFTER_SECONDS * per_second:
        return MAX_RETRY_AFTER_SECONDS
    return bounded((waiting_ahead + 1) / per_second)


def bounded(seconds: float) -> float:
    """Clamp a Retry-After to the range that client libraries honour."""
    return min(max(seconds, MIN_RETRY_AFTER_SECONDS), MAX_RETRY_AFTER_SECONDS)


def _decay(seconds: float) -> float:
    """The remaining weight of an answer after this time."""
    return exp2(-seconds / HALF_LIFE_SECONDS)
