"""Traffic of the last hour: samples of the counters, taken at intervals, and the rates between them."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import TracebackType
from typing import Self

import msgspec

from gateway.observability.metrics import Counter, Metrics
from gateway.status.values import RateStatus, TrafficPoint, TrafficStatus
from serving.defects import logged_defects

INTERVAL_SECONDS = 60.0
HISTORY_SECONDS = 3600.0
RECENT_SECONDS = 300.0
SAMPLE_SECONDS = 5.0
NONE = "none"  # label of a request that no replica was chosen for
ABANDONED = "499"
OVERLOADED = "429"

Served = tuple[str, str, str]  # alias, variant, precision


class Totals(msgspec.Struct, frozen=True, gc=False):
    """What was counted for an alias answered by a variant, since the start of the process."""

    requests: float = 0.0
    failed: float = 0.0
    prompt_tokens: float = 0.0
    answer_tokens: float = 0.0

    def minus(self, other: "Totals") -> "Totals":
        """What was counted since."""
        return Totals(
            self.requests - other.requests,
            self.failed - other.failed,
            self.prompt_tokens - other.prompt_tokens,
            self.answer_tokens - other.answer_tokens,
        )


NOTHING = Totals()


class TrafficSample(msgspec.Struct, frozen=True):
    """The counters at one moment: `at` in seconds since 1970, for people; intervals are between monotonic seconds."""

    at: float
    monotonic_seconds: float
    totals: Mapping[Served, Totals]


# Decisions


def totals_of(
    requests: Mapping[tuple[str, ...], Counter], tokens: Mapping[tuple[str, ...], Counter]
) -> dict[Served, Totals]:
    """Add up the children of `quantgate_requests_total` and `quantgate_tokens_total`; those at 0 are left out."""
    sums: dict[Served, list[float]] = {}
    for (alias, variant, precision, _, code, _), counter in requests.items():
        if counter.value:
            row = sums.setdefault((alias, variant, precision), [0.0] * 4)
            row[0] += counter.value
            row[1] += counter.value if is_failure(code) else 0.0
    for (alias, variant, precision, kind), counter in tokens.items():
        if counter.value and kind != "reasoning":
            row = sums.setdefault((alias, variant, precision), [0.0] * 4)
            row[2 if kind == "prompt" else 3] += counter.value
    return {served: Totals(*row) for served, row in sums.items()}


def is_failure(code: str) -> bool:
    """Whether a result is an error that is not the client's: 429, 5xx, or the code of a stream that broke."""
    if code in (ABANDONED, OVERLOADED):
        return code == OVERLOADED
    return not code.startswith(("2", "3", "4"))


def difference(before: TrafficSample, after: TrafficSample) -> dict[Served, Totals]:
    """What was counted between two samples."""
    return {served: totals.minus(before.totals.get(served, NOTHING)) for served, totals in after.totals.items()}


def point_between(before: TrafficSample, after: TrafficSample) -> TrafficPoint:
    """The rates between two samples, by precision."""
    seconds = max(after.monotonic_seconds - before.monotonic_seconds, 1e-3)
    sums: dict[str, list[float]] = {}
    failed = 0.0
    for (_, _, precision), counted in difference(before, after).items():
        failed += counted.failed
        if precision != NONE:
            row = sums.setdefault(precision, [0.0] * 3)
            row[0] += counted.requests - counted.failed
            row[1] += counted.prompt_tokens
            row[2] += counted.answer_tokens
    rates = {precision: RateStatus(*(round(value / seconds, 4) for value in row)) for precision, row in sums.items()}
    return TrafficPoint(round(after.at, 3), round(seconds, 3), round(failed / seconds, 4), rates)


def traffic_status(history: Sequence[TrafficSample], recent: Sequence[TrafficSample]) -> TrafficStatus:
    """Rates of each interval of the history, of the last INTERVAL_SECONDS, and of the recent samples as a whole."""
    points = [point_between(before, after) for before, after in pairwise(history)]
    lately = point_between(recent[0], recent[-1]) if len(recent) > 1 else None
    if lately is not None:
        # Not since the last interval ended: the rate of a few seconds is that of one answer.
        since = next(sample for sample in reversed(recent) if is_before(sample, recent[-1]) or sample is recent[0])
        points.append(point_between(since, recent[-1]))
    return TrafficStatus(INTERVAL_SECONDS, RECENT_SECONDS, lately, tuple(points))


def is_before(sample: TrafficSample, last: TrafficSample) -> bool:
    """Whether an interval lies between two samples."""
    return last.monotonic_seconds - sample.monotonic_seconds >= INTERVAL_SECONDS


def answered_lately(recent: Sequence[TrafficSample]) -> Mapping[Served, Totals]:
    """What was counted over the recent samples."""
    return difference(recent[0], recent[-1]) if len(recent) > 1 else {}


# Effects


def _ring(seconds: float, interval_seconds: float) -> deque[TrafficSample]:
    return deque(maxlen=int(seconds / interval_seconds) + 1)


@dataclass(slots=True, eq=False)
class TrafficHistory:
    """Samples the counters while the `async with` block runs; keeps an hour by minutes, and the last minutes finer."""

    metrics: Metrics
    wall_clock: Callable[[], float] = time.time
    clock: Callable[[], float] = time.monotonic
    _history: deque[TrafficSample] = field(default_factory=lambda: _ring(HISTORY_SECONDS, INTERVAL_SECONDS))
    _recent: deque[TrafficSample] = field(default_factory=lambda: _ring(RECENT_SECONDS, SAMPLE_SECONDS))
    _task: asyncio.Task[None] | None = field(default=None, init=False)

    async def __aenter__(self) -> Self:
        self.sample()
        self._task = asyncio.create_task(self._sample_regularly(), name="sample traffic")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def sample(self) -> None:
        """Read the counters now."""
        self.add(self.current())

    def add(self, sample: TrafficSample) -> None:
        """Keep a sample; in the history, only one of each interval."""
        self._recent.append(sample)
        last = self._history[-1].monotonic_seconds if self._history else float("-inf")
        if sample.monotonic_seconds - last >= INTERVAL_SECONDS - SAMPLE_SECONDS / 2:
            self._history.append(sample)

    def current(self) -> TrafficSample:
        """The counters as they are now."""
        metrics = self.metrics
        totals = totals_of(metrics.requests.children, metrics.tokens.children)
        return TrafficSample(self.wall_clock(), self.clock(), totals)

    @property
    def history(self) -> tuple[TrafficSample, ...]:
        """The samples of the last hour, by intervals, oldest first."""
        return tuple(self._history)

    @property
    def recent(self) -> tuple[TrafficSample, ...]:
        """The samples of the last RECENT_SECONDS, oldest first, and the counters as they are now."""
        return (*self._recent, self.current())

    async def _sample_regularly(self) -> None:
        while True:
            await asyncio.sleep(SAMPLE_SECONDS)
            with logged_defects("sampling traffic"):
                self.sample()
