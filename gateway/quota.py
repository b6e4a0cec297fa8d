"""Rate limits per API key: requests and tokens per minute, and concurrent requests, counted in this process.

Where several gateways share a state database, `quota_leases` changes what this process holds of each limit.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from gateway.errors import RateLimited
from gateway.keys.authentication import Caller
from gateway.quota_shares import RENEW_SECONDS, Claim, KeyQuota, Limits, Use

Headers = list[tuple[bytes, bytes]]

# retry-after of the concurrency limit: when the next request of the key ends is not known.
BUSY_RETRY_SECONDS = 1.0
# The tokens of a request are known only at its end, so it is admitted if the bucket holds any at all.
MIN_TOKENS = 1e-3
MINUTE_SECONDS = 60.0
# Shorter waits are rounding errors of sums of times.
_ROUNDING_SECONDS = 1e-6
# A bucket that is never refilled would divide by zero.
_LEAST_SHARE = 1e-6


@dataclass(frozen=True, slots=True)
class Bucket:
    """Token bucket with one value of state, the time at which it is full again (GCRA).

    Taking an amount moves that time later. The capacity is one minute's worth, but at least 1. All times are given by
    the caller and must be of one monotonic clock.
    """

    per_minute: float
    full_at_seconds: float = -math.inf

    @property
    def capacity(self) -> float:
        """Amount in a full bucket."""
        return max(self.per_minute, 1.0)

    def seconds_until_full(self, now_seconds: float) -> float:
        """Time until the bucket is full; 0 if it is."""
        return max(self.full_at_seconds - now_seconds, 0.0)

    def remaining(self, now_seconds: float) -> float:
        """Amount in the bucket; negative after an overdraft."""
        return self.capacity - self.seconds_until_full(now_seconds) * self.per_minute / MINUTE_SECONDS

    def seconds_until(self, amount: float, now_seconds: float) -> float:
        """Time until the bucket holds an amount, which is at most its capacity; 0 if it does."""
        missing_seconds = (amount - self.capacity) * MINUTE_SECONDS / self.per_minute
        wait_seconds = self.seconds_until_full(now_seconds) + missing_seconds
        return wait_seconds if wait_seconds > _ROUNDING_SECONDS else 0.0

    def without(self, amount: float, now_seconds: float) -> "Bucket":
        """Take an amount, even if the bucket holds less."""
        start_seconds = max(self.full_at_seconds, now_seconds)
        return Bucket(self.per_minute, start_seconds + amount * MINUTE_SECONDS / self.per_minute)


def with_rate(bucket: Bucket | None, per_minute: float | None, now_seconds: float) -> Bucket | None:
    """Change a bucket's rate and keep the amount that is missing from it; a rate of None: no bucket."""
    if per_minute is None:
        return None
    if bucket is None:
        return Bucket(per_minute)
    if bucket.per_minute == per_minute:
        return bucket
    missing = bucket.seconds_until_full(now_seconds) * bucket.per_minute / MINUTE_SECONDS
    return Bucket(per_minute).without(missing, now_seconds)


def _bucket(per_minute: float | None, share: float, amount: float, now_seconds: float) -> Bucket | None:
    """Return a bucket of a share of a rate that holds an amount; None if the rate is not limited."""
    if per_minute is None:
        return None
    bucket = Bucket(per_minute * share)
    return bucket.without(bucket.capacity - amount, now_seconds)


def format_duration(seconds: float) -> bytes:
    """Format a duration as in OpenAI's rate-limit headers, rounded up: 12ms, 7s, 6m0s, 1h0m0s."""
    if seconds < 1:
        return b"%dms" % math.ceil(seconds * 1000)
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return b"%dh%dm%ds" % (hours, minutes, rest)
    return b"%dm%ds" % (minutes, rest) if minutes else b"%ds" % rest


@dataclass(slots=True)
class Counts:
    """Counters of one key: running requests, and its buckets of requests and tokens (None: not limited).

    `share` and `slots` are what this process holds of the key's limits; None: the share of the quota. `asked`, `taken`,
    `charged` and `wanted` count since the last report; see `Use`.
    """

    running: int = 0
    requests: Bucket | None = None
    tokens: Bucket | None = None
    share: float | None = None
    slots: int | None = None
    caller: Caller | None = None
    asked: int = 0
    taken: int = 0
    charged: int = 0
    wanted: int = 0

    def apply_limits(self, caller: Caller, share: float, now_seconds: float) -> None:
        """Adopt the key's current limits, which a reload may have changed; what was taken stays taken."""
        share = share if self.share is None else self.share
        requests, tokens = caller.requests_per_minute, caller.tokens_per_minute
        self.requests = with_rate(self.requests, None if requests is None else requests * share, now_seconds)
        self.tokens = with_rate(self.tokens, None if tokens is None else tokens * share, now_seconds)

    def take_request(self, now_seconds: float) -> None:
        """Take one request."""
        self.taken += 1
        if self.requests is not None:
            self.requests = self.requests.without(1, now_seconds)

    def charge(self, tokens: int, now_seconds: float) -> None:
        """Take the tokens of an answer, even if the bucket holds less; a debt delays the key's next requests."""
        self.charged += tokens
        if self.tokens is not None:
            self.tokens = self.tokens.without(tokens, now_seconds)

    def hold(self, claim: Claim, limits: Limits, now_seconds: float) -> None:
        """Hold another part of the key's limits; what was used since the last report is taken from it."""
        self.share, self.slots = max(claim.share, _LEAST_SHARE), claim.slots
        self.requests = _bucket(limits.requests_per_minute, self.share, claim.requests - self.taken, now_seconds)
        self.tokens = _bucket(limits.tokens_per_minute, self.share, claim.tokens - self.charged, now_seconds)

    def take_use(self) -> Use | None:
        """Return what was used since the last report, and count anew; None if nothing was."""
        if not (self.asked or self.charged or self.wanted or self.running):
            return None
        use = Use(self.asked, self.taken, self.charged, self.running, self.wanted)
        self.asked = self.taken = self.charged = 0
        self.wanted = self.running
        return use


@dataclass(slots=True)
class RunningRequest:
    """One request among those of its key that run or arrive, from its head to the end of its answer."""

    _counts: Counts | None

    def release(self) -> None:
        """Count the request as ended; idempotent."""
        if self._counts is not None:
            self._counts.running -= 1
            self._counts = None


@dataclass(slots=True)
class Quota:
    """Owns the counters of every key that has limits.

    `share` is this process' part of each limit: with N processes, each gets 1/N of a key's requests and tokens per
    minute and of its concurrency, but at least one request. A key may have another share; see `hold`. All methods take
    times of the same monotonic clock.
    """

    share: float = 1.0
    _counts: dict[str, Counts] = field(default_factory=dict)

    def start(self, caller: Caller) -> RunningRequest | None:
        """Count a request whose head has arrived, until it is released; RateLimited if as many run as may.

        None if the key has no limits.
        """
        if not caller.limited:
            return None
        counts = self._counts_of(caller)
        if caller.concurrency is not None:
            slots = concurrency_share(caller.concurrency, self.share) if counts.slots is None else counts.slots
            if counts.running >= slots:
                counts.wanted += 1
                raise _refusal(caller, f"{caller.concurrency} concurrent requests (concurrency)", BUSY_RETRY_SECONDS)
        counts.running += 1
        counts.wanted = max(counts.wanted, counts.running)
        return RunningRequest(counts)

    def admit(self, caller: Caller, now_seconds: float) -> Counts | None:
        """Take one request from its key; RateLimited, and nothing is taken, if a limit per minute is reached.

        Returns the counts that the tokens of its answer are charged to; None without limits per minute.
        """
        if not caller.rate_limited:
            return None
        counts = self._counts_of(caller)
        counts.asked += 1
        counts.apply_limits(caller, self.share, now_seconds)
        check_limits(counts, caller, now_seconds)
        counts.take_request(now_seconds)
        return counts

    def headers(self, caller: Caller, now_seconds: float, pending_tokens: int = 0) -> Headers:
        """Return the `x-ratelimit-*` headers of a key; empty without limits per minute.

        `pending_tokens` are those of the answer that carries the headers; they are charged at its end.
        """
        if not caller.rate_limited:
            return []
        counts = self._counts_of(caller)
        counts.apply_limits(caller, self.share, now_seconds)
        tokens = counts.tokens
        if tokens is not None and pending_tokens:
            tokens = tokens.without(pending_tokens, now_seconds)
        return limit_headers(counts.requests, tokens, now_seconds)

    def keep_only(self, names: Collection[str]) -> None:
        """Drop the counters of all other keys, except those with running requests; called after a reload."""
        self._counts = {name: counts for name, counts in self._counts.items() if name in names or counts.running}

    def take_report(self) -> dict[str, tuple[Limits, Use]]:
        """Return what was used of each key since the last report, and count anew."""
        report = {}
        for name, counts in self._counts.items():
            if counts.caller is not None and (use := counts.take_use()) is not None:
                report[name] = _limits(counts.caller), use
        return report

    def hold(self, worker: str, quotas: Mapping[str, KeyQuota], share: float, now_seconds: float) -> None:
        """Hold what a worker got of the keys that are used, and of all others a share."""
        self.share = share
        for name, counts in self._counts.items():
            if name not in quotas:
                counts.share = counts.slots = None
        for name, quota in quotas.items():
            if (claim := quota.claims.get(worker)) is not None:
                self._counts.setdefault(name, Counts()).hold(claim, quota.limits, now_seconds)

    def hold_share(self) -> None:
        """Hold the same share of every key: nobody else is known to hold less."""
        for counts in self._counts.values():
            counts.share = counts.slots = None

    def __repr__(self) -> str:
        return f"<Quota [{', '.join(f'{name}: {counts.running} running' for name, counts in self._counts.items())}]>"

    def _counts_of(self, caller: Caller) -> Counts:
        name = caller.name or ""
        counts = self._counts.get(name)
        if counts is None:
            counts = self._counts[name] = Counts()
        counts.caller = caller
        return counts


def check_limits(counts: Counts, caller: Caller, now_seconds: float) -> None:
    """Raise RateLimited, with the limit and the time to wait, if the key may not send another request now."""
    if counts.requests is not None and (seconds := counts.requests.seconds_until(1, now_seconds)):
        if counts.share is not None:
            seconds = lease_wait_seconds(counts.requests, counts.share, 1, counts.taken, now_seconds)
        raise _refusal(caller, f"{caller.requests_per_minute} requests per minute (requests_per_minute)", seconds)
    if counts.tokens is not None and (seconds := counts.tokens.seconds_until(MIN_TOKENS, now_seconds)):
        if counts.share is not None:
            seconds = lease_wait_seconds(counts.tokens, counts.share, MIN_TOKENS, counts.charged, now_seconds)
        raise _refusal(caller, f"{caller.tokens_per_minute} tokens per minute (tokens_per_minute)", seconds)


def lease_wait_seconds(bucket: Bucket, share: float, amount: float, used: float, now_seconds: float) -> float:
    """Estimate the time until a bucket that holds a share of a key's rate has an amount.

    The share follows demand, so what is missing comes at the key's whole rate, with the next report or later. A debt
    of the last report was divided like the rate; what was `used` since then was not.
    """
    remaining = bucket.remaining(now_seconds)
    debt = max(-remaining - used, 0.0)
    whole_seconds = (debt + (amount - remaining - debt) * share) * MINUTE_SECONDS / bucket.per_minute
    return min(bucket.seconds_until(amount, now_seconds), max(whole_seconds, RENEW_SECONDS))


def concurrency_share(concurrency: int, share: float) -> int:
    """Return how many requests of a key one process runs concurrently."""
    return max(1, int(concurrency * share + 1e-9))  # in floats, 98 * (1 / 49) is slightly less than 2


def limit_headers(requests: Bucket | None, tokens: Bucket | None, now_seconds: float) -> Headers:
    """Format `x-ratelimit-*` as OpenAI does, for this process' share; `reset` is the time until the bucket is full."""
    headers = []
    for kind, bucket in ((b"requests", requests), (b"tokens", tokens)):
        if bucket is not None:
            remaining = max(int(bucket.remaining(now_seconds) + 1e-6), 0)
            headers += [
                (b"x-ratelimit-limit-" + kind, b"%d" % bucket.capacity),
                (b"x-ratelimit-remaining-" + kind, b"%d" % remaining),
                (b"x-ratelimit-reset-" + kind, format_duration(bucket.seconds_until_full(now_seconds))),
            ]
    return headers


def _limits(caller: Caller) -> Limits:
    return Limits(caller.requests_per_minute, caller.tokens_per_minute, caller.concurrency)


def _refusal(caller: Caller, limit: str, seconds: float) -> RateLimited:
    wait = format_duration(seconds).decode()
    message = (
        f"the key {caller.name!r} has reached its limit of {limit}; "
        f"retry in {wait}, or ask the operator to raise the limit"
    )
    return RateLimited(message, retry_after_seconds=seconds)
