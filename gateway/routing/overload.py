"""Overload of a replica: one that answered 429 or 503 is spared for a while, and has not failed.

An overloaded replica comes after all others; when every replica of the permitted rungs is overloaded, requests wait in
the queue. Times are on the monotonic clock.
"""

from dataclasses import dataclass
from math import inf

import msgspec


@dataclass(frozen=True, slots=True)
class BackoffPolicy:
    """For how long a replica is spared after a refusal."""

    first_seconds: float = 0.25
    max_seconds: float = 5
    # However long the replica itself asks for.
    max_retry_after_seconds: float = 10
    # Without a refusal for so long, each answer raises the limit by one; after `memory_seconds` it is forgotten.
    quiet_seconds: float = 1
    memory_seconds: float = 60


DEFAULT_BACKOFF = BackoffPolicy()


class Overload(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """Refusals since the last answer, and until when they count; NOT_OVERLOADED is none.

    `limit` is how many requests the replica had when it refused one more. Without it, the whole queue would be sent to
    it with every answer.
    """

    refusals: int = 0
    until: float = -inf
    limit: float = inf
    refused_at: float = -inf

    def active(self, now: float) -> bool:
        """Return whether the replica is to be spared."""
        return now < self.until


# Of a replica that accepts what it is sent; no owner keeps it.
NOT_OVERLOADED = Overload()


def refused(
    overload: Overload,
    now: float,
    retry_after_seconds: float | None = None,
    *,
    in_flight: float = inf,
    policy: BackoffPolicy = DEFAULT_BACKOFF,
) -> Overload:
    """Spare the replica as long as it asked for, or twice as long as the last time; `in_flight` others are with it.

    Refusals that arrive while it is spared were under way already: they belong to the same wave and double nothing.
    """
    refusals = overload.refusals if overload.active(now) else overload.refusals + 1
    if retry_after_seconds is not None and retry_after_seconds > 0:
        seconds = min(max(retry_after_seconds, policy.first_seconds), policy.max_retry_after_seconds)
    else:
        # The exponent is bounded, for 2.0 ** 2000 is an error.
        seconds = min(policy.first_seconds * 2.0 ** min(refusals - 1, 60), policy.max_seconds)
    return Overload(refusals, max(overload.until, now + seconds), min(overload.limit, in_flight), now)


def accepted(overload: Overload, now: float, *, policy: BackoffPolicy = DEFAULT_BACKOFF) -> Overload:
    """Forget the refusals: the replica answers. Its limit is remembered for longer."""
    quiet_seconds = now - overload.refused_at
    if overload.limit == inf or quiet_seconds > policy.memory_seconds:
        return NOT_OVERLOADED
    return Overload(0, -inf, overload.limit + (quiet_seconds >= policy.quiet_seconds), overload.refused_at)
