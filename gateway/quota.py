"""How much each key asks: the counts of one process, and who is refused by them."""

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from gateway.errors import RateLimited
from gateway.keys.caller import ANONYMOUS, Caller

Headers = list[tuple[bytes, bytes]]

# Nobody knows when another of the key's requests ends.
BUSY_RETRY_SECONDS = 1.0
# A bucket of tokens must hold something: how many a request takes is known when it is answered.
SOMETHING = 1e-3
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


@dataclass(slots=True)
class Counts:
    """What one key asks: requests running now, and what it may still ask for this minute."""

    running: int = 0
    requests: Bucket | None = None
    tokens: Bucket | None = None

    def hold_against(self, caller: Caller, share: float, now_seconds: float) -> None:
        """Go by the limits that the key has now; None stays None, and what was taken stays so."""
        requests, tokens = caller.requests_per_minute, caller.tokens_per_minute
        self.requests = at_rate(self.requests, None if requests is None else requests * share, now_seconds)
        self.tokens = at_rate(self.tokens, None if tokens is None else tokens * share, now_seconds)

    def begin(self, now_seconds: float) -> None:
        """Count a request that was admitted."""
        self.running += 1
        if self.requests is not None:
            self.requests = self.requests.without(1, now_seconds)

    def end(self) -> None:
        """Count a request as done."""
        self.running -= 1

    def spend(self, tokens: int, now_seconds: float) -> None:
        """Take an answer's tokens, whether they were there or not."""
        if self.tokens is not None:
            self.tokens = self.tokens.without(tokens, now_seconds)


@dataclass(slots=True)
class Admission:
    """One request's place within its key's limits, for as long as the `with` block runs."""

    caller: Caller
    counts: Counts | None  # None: no limits
    share: float = 1.0
    now_seconds: float = 0.0

    def __enter__(self) -> Self:
        """Count the request; RateLimited, and nothing is counted, if that would be one too many."""
        if self.counts is not None:
            self.counts.hold_against(self.caller, self.share, self.now_seconds)
            check(self.counts, self.caller, self.share, self.now_seconds)
            self.counts.begin(self.now_seconds)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.counts is not None:
            self.counts.end()

    def spent(self, tokens: int, now_seconds: float) -> None:
        """Charge what an answer took: later requests wait until it is made up for."""
        if self.counts is not None:
            self.counts.spend(tokens, now_seconds)


_UNLIMITED = Admission(ANONYMOUS, None)


@dataclass(slots=True)
class Quota:
    """Owns the counts of every key that has limits; `share` of each limit is this process' own.

    With N processes each gets 1/N of what a key may ask a minute and of what it may have running, but at least one.
    """

    share: float = 1.0
    _counts: dict[str, Counts] = field(default_factory=dict)

    def enter(self, caller: Caller, now_seconds: float) -> Admission:
        """A place for one request: entering its `with` block raises RateLimited, or counts until the block ends.

        The clock is anybody's that never goes back, the same for all methods.
        """
        if caller.requests_per_minute is None and caller.tokens_per_minute is None and caller.concurrency is None:
            return _UNLIMITED
        return Admission(caller, self._of(caller), self.share, now_seconds)

    def headers(self, caller: Caller, now_seconds: float) -> Headers:
        """The headers that tell a client its limits a minute and what is left; none for a key without any."""
        if caller.requests_per_minute is None and caller.tokens_per_minute is None:
            return []
        counts = self._of(caller)
        counts.hold_against(caller, self.share, now_seconds)
        return limit_headers(counts, now_seconds)

    def keep(self, names: Collection[str]) -> None:
        """Forget all keys but these, and those whose requests still run."""
        self._counts = {name: counts for name, counts in self._counts.items() if name in names or counts.running}

    def __repr__(self) -> str:
        return f"<Quota [{', '.join(f'{name}: {counts.running} running' for name, counts in self._counts.items())}]>"

    def _of(self, caller: Caller) -> Counts:
        name = caller.name or ""
        counts = self._counts.get(name)
        if counts is None:
            counts = self._counts[name] = Counts()
        return counts


def check(counts: Counts, caller: Caller, share: float, now_seconds: float) -> None:
    """RateLimited, which tells the limit and when to try again, if a key may not ask once more now."""
    if caller.concurrency is not None and counts.running >= at_once(caller.concurrency, share):
        what = f"may have {caller.concurrency} running at the same time (concurrency), and has"
        raise _refusal(caller, what, BUSY_RETRY_SECONDS)
    if counts.requests is not None and (seconds := counts.requests.holds_in_seconds(1, now_seconds)):
        what = f"may ask {caller.requests_per_minute} times a minute (requests_per_minute), and has"
        raise _refusal(caller, what, seconds)
    if counts.tokens is not None and (seconds := counts.tokens.holds_in_seconds(SOMETHING, now_seconds)):
        what = f"may use {caller.tokens_per_minute} tokens a minute (tokens_per_minute), and has"
        raise _refusal(caller, what, seconds)


def at_once(concurrency: int, share: float) -> int:
    """How many requests of a key one process runs at the same time."""
    return max(1, int(concurrency * share + 1e-9))  # 98 times a 49th is 2, whatever floats say


def limit_headers(counts: Counts, now_seconds: float) -> Headers:
    """`x-ratelimit-*` as OpenAI sends them, of this process' share; reset is when all of it is there again."""
    headers = []
    for kind, bucket in ((b"requests", counts.requests), (b"tokens", counts.tokens)):
        if bucket is not None:
            left = max(int(bucket.remaining(now_seconds) + 1e-6), 0)
            headers += [
                (b"x-ratelimit-limit-" + kind, b"%d" % bucket.capacity),
                (b"x-ratelimit-remaining-" + kind, b"%d" % left),
                (b"x-ratelimit-reset-" + kind, duration(bucket.fills_in_seconds(now_seconds))),
            ]
    return headers


def _refusal(caller: Caller, what: str, seconds: float) -> RateLimited:
    wait = duration(seconds).decode()
    message = f"the key {caller.name!r} {what}; try again in {wait}, or have the limit raised"
    return RateLimited(message, retry_after_seconds=seconds)
