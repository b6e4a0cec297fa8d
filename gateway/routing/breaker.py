"""A circuit breaker for each replica, and the replicas of a variant that may receive a request.

=========  =======================================================  =========
state      event                                                    next
=========  =======================================================  =========
closed     failure number `consecutive_failures` in a row           open
closed     `failure_ratio` of at least `min_results` results fail   open
open       `open_seconds` have passed                               half_open
open       a success                                                closed
half_open  a success                                                closed
half_open  a failure                                                open
=========  =======================================================  =========

A half-open breaker admits one request at a time, the probe. The next one is admitted if the probe is abandoned, or
after `probe_seconds`. `open_seconds` doubles with each opening, from `first_open_seconds` to `max_open_seconds`, and
starts anew after `memory_seconds` without a failure in the closed state. A failure does not extend the time of an open
breaker. Results of requests that were sent before the breaker opened are ignored.

A failure that turns out to be the request's own is `retracted`: the breaker is as it would be without it.

Overload (429, 503) is not a failure: see gateway.routing.overload. Times are on the monotonic clock.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Literal, NamedTuple

import msgspec
from msgspec.structs import replace

BreakerState = Literal["closed", "open", "half_open"]


@dataclass(frozen=True, slots=True)
class BreakerPolicy:
    """When a breaker opens, and for how long."""

    consecutive_failures: int = 3
    failure_ratio: float = 0.5  # of at least `min_results`
    min_results: int = 10
    # The current bucket and the one before are counted: a result counts for one to two times this long.
    bucket_seconds: float = 15
    first_open_seconds: float = 1
    max_open_seconds: float = 30
    # After this time, a probe that has neither ended nor been abandoned is lost.
    probe_seconds: float = 30

    @property
    def memory_seconds(self) -> float:
        """How long failures and the last opening count."""
        return 2 * self.bucket_seconds


DEFAULT_POLICY = BreakerPolicy()


class Tally(msgspec.Struct, frozen=True, gc=False):
    """Successes and failures in the current time bucket and in the one before."""

    bucket: int = 0
    good: int = 0
    bad: int = 0
    good_before: int = 0
    bad_before: int = 0

    def at(self, bucket: int) -> "Tally":
        """Advance to a later bucket; results older than the bucket before it are dropped."""
        if bucket <= self.bucket:
            return self
        if bucket == self.bucket + 1:
            return Tally(bucket, 0, 0, self.good, self.bad)
        return Tally(bucket)

    def plus(self, good: int, bad: int) -> "Tally":
        """Add results to the current bucket."""
        return Tally(self.bucket, self.good + good, self.bad + bad, self.good_before, self.bad_before)

    def minus(self, bucket: int) -> "Tally":
        """Take a failure out of the bucket in which it was counted, if that still counts."""
        if bucket == self.bucket:
            return replace(self, bad=max(self.bad - 1, 0))
        return replace(self, bad_before=max(self.bad_before - 1, 0)) if bucket == self.bucket - 1 else self

    @property
    def failures(self) -> int:
        """Failures in both buckets."""
        return self.bad + self.bad_before

    @property
    def results(self) -> int:
        """Successes and failures in both buckets."""
        return self.good + self.good_before + self.failures


class Breaker(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """The breaker of one replica; HEALTHY is one without any failure that counts.

    The fields are part of the routing snapshot (`/admin/routing`).
    """

    tripped: bool = False
    failures_in_a_row: int = 0
    tally: Tally = Tally()
    failed_at: float = -inf
    # A success from this time on resets the breaker to HEALTHY.
    spotless_at: float = -inf
    # The latest opening. Kept after closing, so that a breaker that soon opens again stays open for longer.
    opened_at: float = -inf
    open_seconds: float = 0
    probe_until: float = -inf
    # The last failure was a timeout: another request would lose as much time.
    timed_out: bool = False

    def state(self, now: float) -> BreakerState:
        """The state: closed admits all requests, open none, half_open one at a time as a probe."""
        if not self.tripped:
            return "closed"
        return "open" if now < self.opened_at + self.open_seconds else "half_open"

    def admits(self, now: float) -> bool:
        """Whether a request may be sent to the replica: the breaker is closed, or a probe is due."""
        return not self.tripped or now >= max(self.opened_at + self.open_seconds, self.probe_until)

    def badness(self, now: float, policy: BreakerPolicy = DEFAULT_POLICY) -> tuple[int, float]:
        """Sort key: the number of failures, recent or consecutive, then the time of the last one. Lower is better."""
        recent = self.tally.at(_bucket(now, policy)).failures
        return max(recent, self.failures_in_a_row), self.failed_at


# Shared by all replicas without failures: owners need not store it.
HEALTHY = Breaker()


def failed(
    breaker: Breaker,
    now: float,
    *,
    asked_at: float = inf,
    timed_out: bool = False,
    policy: BreakerPolicy = DEFAULT_POLICY,
) -> Breaker:
    """Count a failure of a request sent at `asked_at`.

    A request that was sent before the latest opening belongs to the failures that opened the breaker: it is ignored.
    """
    if asked_at < breaker.opened_at:
        return breaker
    if not breaker.tripped and now >= breaker.spotless_at:
        breaker = HEALTHY
    updated = replace(
        breaker,
        failures_in_a_row=breaker.failures_in_a_row + 1,
        tally=breaker.tally.at(_bucket(now, policy)).plus(good=0, bad=1),
        failed_at=now,
        spotless_at=now + policy.memory_seconds,
        timed_out=timed_out,
    )
    state = breaker.state(now)
    if state == "half_open" or (state == "closed" and _exceeds_limits(updated, policy)):
        return _opened(updated, now, policy)
    return updated


def succeeded(
    breaker: Breaker, now: float, *, asked_at: float = inf, policy: BreakerPolicy = DEFAULT_POLICY
) -> Breaker:
    """Count a success of a request sent at `asked_at`, which closes the breaker. HEALTHY is returned as it is."""
    if breaker is HEALTHY or asked_at < breaker.opened_at:
        return breaker
    if breaker.tripped:
        return Breaker(
            failed_at=breaker.failed_at,
            spotless_at=now + policy.memory_seconds,
            opened_at=breaker.opened_at,
            open_seconds=breaker.open_seconds,
        )
    if now >= breaker.spotless_at:
        return HEALTHY
    tally = breaker.tally.at(_bucket(now, policy)).plus(good=1, bad=0)
    return replace(breaker, failures_in_a_row=0, tally=tally, timed_out=False)


def retracted(breaker: Breaker, before: Breaker, after: Breaker, *, policy: BreakerPolicy = DEFAULT_POLICY) -> Breaker:
    """Take back the failure that turned a breaker from `before` into `after`, whatever has happened to it since."""
    if breaker is after:
        # If its request was the probe, another one is due.
        return abandoned(before)
    if breaker.tripped and before.opened_at < after.opened_at == breaker.opened_at:
        # This failure opened it, so what came since has changed no more than its counts.
        breaker = replace(breaker, tripped=before.tripped, opened_at=before.opened_at, open_seconds=before.open_seconds)
    row = max(breaker.failures_in_a_row - 1, 0)
    fewer = replace(breaker, failures_in_a_row=row, tally=breaker.tally.minus(after.tally.bucket))
    if fewer.tripped and not before.tripped and not _exceeds_limits(fewer, policy):
        return replace(fewer, tripped=False)
    return fewer


def probing(breaker: Breaker, now: float, *, policy: BreakerPolicy = DEFAULT_POLICY) -> Breaker:
    """Mark the request that is being sent as the probe, if the breaker is half-open and admits one."""
    if not breaker.tripped or not breaker.admits(now):
        return breaker
    return replace(breaker, probe_until=now + policy.probe_seconds)


def abandoned(breaker: Breaker) -> Breaker:
    """Make the next request the probe: the client of this one disconnected before there was a result."""
    return breaker if breaker.probe_until == -inf else replace(breaker, probe_until=-inf)


class Admitted(NamedTuple):
    """Replicas that may receive a request; those in `last_resort` have an open breaker."""

    first: Sequence[str]
    last_resort: Sequence[str]


def admissible(replicas: Sequence[str], breakers: Mapping[str, Breaker], now: float) -> Admitted:
    """Eject failing replicas of a variant, at most half of the ready ones; the best of the others are a last resort.

    Compare `max_ejection_percent` of Envoy's outlier detection.
    """
    if not breakers:
        return Admitted(replicas, ())
    first: list[str] = []
    ejected: list[str] = []
    for replica in replicas:
        (first if breakers.get(replica, HEALTHY).admits(now) else ejected).append(replica)
    excess = len(ejected) - len(replicas) // 2
    if excess <= 0:
        return Admitted(first, ())
    ejected.sort(key=lambda replica: breakers[replica].badness(now))
    return Admitted(first, ejected[:excess])


def in_rotation(replicas: Sequence[str], breakers: Mapping[str, Breaker], now: float) -> Collection[str]:
    """Replicas of a variant that get their share of its requests: at most half are left out, whatever rungs are below.

    A last resort whose failures are timeouts is left out, too: a request would wait there for its whole timeout before
    another replica answers it, while other failures come at once.
    """
    first, last_resort = admissible(replicas, breakers, now)
    if not last_resort:
        return first
    return {*first, *(replica for replica in last_resort if not breakers[replica].timed_out)}


def _exceeds_limits(breaker: Breaker, policy: BreakerPolicy) -> bool:
    """Whether a closed breaker must open."""
    tally = breaker.tally
    ratio_exceeded = tally.results >= policy.min_results and tally.failures >= policy.failure_ratio * tally.results
    return ratio_exceeded or breaker.failures_in_a_row >= policy.consecutive_failures


def _opened(breaker: Breaker, now: float, policy: BreakerPolicy) -> Breaker:
    """Open the breaker for twice as long as the last time, within the limits of the policy."""
    seconds = min(max(policy.first_open_seconds, 2 * breaker.open_seconds), policy.max_open_seconds)
    return replace(breaker, tripped=True, opened_at=now, open_seconds=seconds, probe_until=-inf)


def _bucket(now: float, policy: BreakerPolicy) -> int:
    """The number of the time bucket at `now`."""
    return int(now // policy.bucket_seconds)
