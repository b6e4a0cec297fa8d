"""A bucket that refills continuously and holds a minute's worth, as a value: what may still be taken, and when more."""

import math
from dataclasses import dataclass

MINUTE_SECONDS = 60.0
# Far below what anybody notices, far above what sums of times are off by.
_ROUNDING_SECONDS = 1e-6


@dataclass(frozen=True, slots=True)
class Bucket:
    """All that changes is the time at which it will be full again: what is taken puts that off (GCRA).

    Every time is told by the caller, of one clock. A rate below one a minute still holds one.
    """

    per_minute: float
    full_at_seconds: float = -math.inf

    @property
    def capacity(self) -> float:
        """What a full one holds."""
        return max(self.per_minute, 1.0)

    def fills_in_seconds(self, now_seconds: float) -> float:
        """The time until it is full."""
        return max(self.full_at_seconds - now_seconds, 0.0)

    def remaining(self, now_seconds: float) -> float:
        """What is in it; below zero if more was taken than there was."""
        return self.capacity - self.fills_in_seconds(now_seconds) * self.per_minute / MINUTE_SECONDS

    def holds_in_seconds(self, amount: float, now_seconds: float) -> float:
        """The time until it holds an amount, at most its capacity; 0: it does."""
        lacking_seconds = (amount - self.capacity) * MINUTE_SECONDS / self.per_minute
        wait_seconds = self.fills_in_seconds(now_seconds) + lacking_seconds
        return wait_seconds if wait_seconds > _ROUNDING_SECONDS else 0.0

    def without(self, amount: float, now_seconds: float) -> "Bucket":
        """Take an amount, whether it is there or not."""
        begin_seconds = max(self.full_at_seconds, now_seconds)
        return Bucket(self.per_minute, begin_seconds + amount * MINUTE_SECONDS / self.per_minute)


def at_rate(bucket: Bucket | None, per_minute: float | None, now_seconds: float) -> Bucket | None:
    """A bucket of this rate, from which as much is missing as from the one before; None: no limit."""
    if per_minute is None:
        return None
    if bucket is None:
        return Bucket(per_minute)
    if bucket.per_minute == per_minute:
        return bucket
    missing = bucket.fills_in_seconds(now_seconds) * bucket.per_minute / MINUTE_SECONDS
    return Bucket(per_minute).without(missing, now_seconds)


def duration(seconds: float) -> bytes:
    """Write a time the way OpenAI's rate-limit headers do, rounded up: 12ms, 7s, 6m0s, 1h0m0s."""
    if seconds < 1:
        return b"%dms" % math.ceil(seconds * 1000)
    minutes, left = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return b"%dh%dm%ds" % (hours, minutes, left)
    return b"%dm%ds" % (minutes, left) if minutes else b"%ds" % left
