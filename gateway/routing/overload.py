"""Which replicas are full: one that refused for want of room (429, 503) is spared for a while, and has not failed.

A full replica comes after all others; when every replica of the permitted rungs is full, the request waits in line.
Times are on the monotonic clock.
"""

from dataclasses import dataclass
from math import inf


@dataclass(frozen=True, slots=True)
class BackoffPolicy:
    """For how long a replica is spared after a refusal."""

    first_seconds: float = 0.25
    longest_seconds: float = 5
    # However long the replica itself asks for.
    longest_asked_seconds: float = 10
    # Without a refusal for so long, each answer lets one more request in at once; then all of it is forgotten.
    quiet_seconds: float = 1
    memory_seconds: float = 60


DEFAULT_BACKOFF = BackoffPolicy()


@dataclass(frozen=True, slots=True)
class Overload:
    """Refusals since the last answer, and until when they hold; ROOMY is none.

    `most` is what it took at once when it refused one more: else the whole line would be sent to it with every answer.
    """

    refusals: int = 0
    until: float = -inf
    most: float = inf
    refused_at: float = -inf

    def full(self, now: float) -> bool:
        """Tell whether the replica is to be spared."""
        return now < self.until


# Of a replica that takes what it is sent; nobody needs to keep it.
NOT_OVERLOADED = Overload()


def refused(
    mark: Overload,
    now: float,
    retry_after_seconds: float | None = None,
    *,
    at_once: float = inf,
    holds: BackoffPolicy = DEFAULT_BACKOFF,
) -> Overload:
    """Spare the replica as long as it asked for, or twice as long as the last time; `at_once` others are with it.

    Refusals that come while it is spared already were under way: they are the same wave, and double nothing.
    """
    refusals = mark.refusals if mark.full(now) else mark.refusals + 1
    if retry_after_seconds is not None and retry_after_seconds > 0:
        hold_seconds = min(max(retry_after_seconds, holds.first_seconds), holds.longest_asked_seconds)
    else:
        # The exponent is bounded, for 2.0 ** 2000 is an error.
        hold_seconds = min(holds.first_seconds * 2.0 ** min(refusals - 1, 60), holds.longest_seconds)
    return Overload(refusals, max(mark.until, now + hold_seconds), min(mark.most, at_once), now)


def accepted(mark: Overload, now: float, *, holds: BackoffPolicy = DEFAULT_BACKOFF) -> Overload:
    """Forget the refusals: the replica answers. How much it takes at once is remembered for longer."""
    quiet_seconds = now - mark.refused_at
    if mark.most == inf or quiet_seconds > holds.memory_seconds:
        return NOT_OVERLOADED
    return Overload(0, -inf, mark.most + (quiet_seconds >= holds.quiet_seconds), mark.refused_at)
