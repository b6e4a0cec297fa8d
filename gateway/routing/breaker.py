"""Which replicas fail: a circuit breaker for each, and whom of a variant's replicas a request may go to.

    closed --(failures in a row, or half of the recent answers)--> open --(its time is up)--> half_open
    half_open --(failed)--> open, twice as long        open | half_open --(succeeded)--> closed

A refusal for want of room (429, 503) is no failure: see gateway.routing.shedding. Times are on the monotonic clock.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Literal, NamedTuple

import msgspec
from msgspec.structs import replace

BreakerState = Literal["closed", "open", "half_open"]


@dataclass(frozen=True, slots=True)
class BreakerPolicy:
    """When a breaker opens, and for how long."""

    failures_in_a_row: int = 3
    failed_share: float = 0.5
    least_results: int = 10
    # Results are counted in two buckets, so that they're remembered for one to two times as long.
    bucket_seconds: float = 15
    first_open_seconds: float = 1
    longest_open_seconds: float = 30
    # A probe that has neither ended nor been abandoned by then counts for lost.
    probe_seconds: float = 30

    @property
    def memory_seconds(self) -> float:
        """How long a failure, or an opening, is held against a replica."""
        return 2 * self.bucket_seconds


DEFAULT_POLICY = BreakerPolicy()


class Tally(msgspec.Struct, frozen=True, gc=False):
    """Results in the current bucket of time and in the one before."""

    bucket: int = 0
    good: int = 0
    bad: int = 0
    good_before: int = 0
    bad_before: int = 0

    def at(self, bucket: int) -> "Tally":
        """Turn to a later bucket; what is older than the one before it is forgotten."""
        if bucket <= self.bucket:
            return self
        if bucket == self.bucket + 1:
            return Tally(bucket, 0, 0, self.good, self.bad)
        return Tally(bucket)

    def plus(self, good: int, bad: int) -> "Tally":
        """Add results to the current bucket."""
        return Tally(self.bucket, self.good + good, self.bad + bad, self.good_before, self.bad_before)

    @property
    def failures(self) -> int:
        """Failures remembered."""
        return self.bad + self.bad_before

    @property
    def results(self) -> int:
        """Results remembered."""
        return self.good + self.good_before + self.failures


class Breaker(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """What is held against one replica; HEALTHY is nothing at all."""

    tripped: bool = False
    failures_in_a_row: int = 0
    tally: Tally = Tally()
    failed_at: float = -inf
    # From then on, a success wipes the slate clean.
    spotless_at: float = -inf
    # The latest opening; both outlive it, so that a replica that opens again soon stays out for longer.
    opened_at: float = -inf
    open_seconds: float = 0
    probe_until: float = -inf

    def state(self, now: float) -> BreakerState:
        """Say whether requests pass (closed), none does (open) or one at a time may find out (half_open)."""
        if not self.tripped:
            return "closed"
        return "open" if now < self.opened_at + self.open_seconds else "half_open"

    def admits(self, now: float) -> bool:
        """Tell whether a request may go to this replica: the breaker is closed, or a probe is due."""
        return not self.tripped or now >= max(self.opened_at + self.open_seconds, self.probe_until)

    def badness(self, now: float, policy: BreakerPolicy = DEFAULT_POLICY) -> tuple[int, float]:
        """Sort the least bad first: fewest failures, recent or without a success since; then the longest ago."""
        recent = self.tally.at(_bucket(now, policy)).failures
        return max(recent, self.failures_in_a_row), self.failed_at


# Of a replica that has done nothing wrong for a while; nobody needs to keep it.
HEALTHY = Breaker()


def failed(breaker: Breaker, now: float, *, asked_at: float = inf, policy: BreakerPolicy = DEFAULT_POLICY) -> Breaker:
    """Count a failure; what was asked before the latest opening is part of what opened it, and says nothing new."""
    if asked_at < breaker.opened_at:
        return breaker
    if not breaker.tripped and now >= breaker.spotless_at:
        breaker = HEALTHY
    noted = replace(
        breaker,
        failures_in_a_row=breaker.failures_in_a_row + 1,
        tally=breaker.tally.at(_bucket(now, policy)).plus(good=0, bad=1),
        failed_at=now,
        spotless_at=now + policy.memory_seconds,
    )
    state = breaker.state(now)
    if state == "half_open" or (state == "closed" and _too_many(noted, policy)):
        return _opened(noted, now, policy)
    return noted


def succeeded(
    breaker: Breaker, now: float, *, asked_at: float = inf, policy: BreakerPolicy = DEFAULT_POLICY
) -> Breaker:
    """Count a success, which closes; the breaker of a healthy replica comes back as it is."""
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
    return replace(breaker, failures_in_a_row=0, tally=tally)


def probing(breaker: Breaker, now: float, *, policy: BreakerPolicy = DEFAULT_POLICY) -> Breaker:
    """Note that a request goes out as the probe of a half-open breaker; any other stays as it is."""
    if not breaker.tripped or not breaker.admits(now):
        return breaker
    return replace(breaker, probe_until=now + policy.probe_seconds)


def abandoned(breaker: Breaker) -> Breaker:
    """Let the next request be the probe: the client of this one left before it showed anything."""
    return breaker if breaker.probe_until == -inf else replace(breaker, probe_until=-inf)


class Admitted(NamedTuple):
    """Replicas that may be asked; those of the last resort come after the first of every permitted rung."""

    first: Sequence[str]
    last_resort: Sequence[str]


def admissible(replicas: Sequence[str], breakers: Mapping[str, Breaker], now: float) -> Admitted:
    """Bar the failing ones of a variant's ready replicas, at most half; the least bad above that are a last resort."""
    if not breakers:
        return Admitted(replicas, ())
    first: list[str] = []
    barred: list[str] = []
    for replica in replicas:
        (first if breakers.get(replica, HEALTHY).admits(now) else barred).append(replica)
    too_many = len(barred) - len(replicas) // 2
    if too_many <= 0:
        return Admitted(first, ())
    barred.sort(key=lambda replica: breakers[replica].badness(now))
    return Admitted(first, barred[:too_many])


def _too_many(breaker: Breaker, policy: BreakerPolicy) -> bool:
    """Tell whether a closed breaker has seen enough."""
    tally = breaker.tally
    half = tally.results >= policy.least_results and tally.failures >= policy.failed_share * tally.results
    return half or breaker.failures_in_a_row >= policy.failures_in_a_row


def _opened(breaker: Breaker, now: float, policy: BreakerPolicy) -> Breaker:
    """Open, for twice as long as the last time."""
    seconds = min(max(policy.first_open_seconds, 2 * breaker.open_seconds), policy.longest_open_seconds)
    return replace(breaker, tripped=True, opened_at=now, open_seconds=seconds, probe_until=-inf)


def _bucket(now: float, policy: BreakerPolicy) -> int:
    """Number the bucket of time that results count into."""
    return int(now // policy.bucket_seconds)
