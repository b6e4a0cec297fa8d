"""Poll the metrics of every ready replica, and report what they say of its load."""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from random import Random
from types import TracebackType
from typing import Literal, Protocol, Self, get_args

import msgspec

from gateway.errors import UpstreamError, UpstreamTimeout
from gateway.observability.metrics.instruments import Counter, Family
from gateway.proxy.load.poll_share import PollReport, PollShare
from gateway.proxy.upstream.pool import Pool
from gateway.routing.engine_metrics import EngineMetrics, PollResult, parse_metrics
from gateway.routing.silence import MIN_TIMEOUTS
from serving.registry import Registry
from serving.replica import Replica

log = logging.getLogger(__name__)

# Jitter shortens an interval by up to this share, so that it is never longer than configured.
JITTER = 0.2
# First polls are spread over this time for each one that is due.
START_SECONDS = 0.01
# From one poll of a replica to the next, at the shortest, where workers share polls.
SHARED_POLL_SECONDS = 1.0
PAGE_LIMIT_BYTES = 4 * 2**20

# A replica that did not answer several polls in time may be slow, rather than hang.
SLOW_FACTOR = 5

Outcome = Literal["ok", "missing", "failed"]
OnAnswer = Callable[[str, bool], None]


class PollObserver(Protocol):
    """Receives the results of polls, in the step in which they arrive."""

    def busy(self, replica_id: str) -> bool:
        """Return whether a replica's load changes fast enough for frequent polls."""

    def polled(self, replica_id: str, polled_at: float, poll: EngineMetrics) -> None:
        """A poll that was sent at `polled_at` (monotonic) says how many requests a replica has."""

    def poll_failed(self, replica_id: str) -> None:
        """A poll failed, or does not say how many requests there are."""


class PollIntervals(msgspec.Struct, frozen=True):
    """From the start of one poll to the next, at rest and while a replica is busy; and how long one may take.

    `unanswered_seconds` is the interval while a replica does not answer: who cannot answer is not kept from work, and
    must be known to hang soon. A worker polls a replica of another one after `report_timeout_seconds` without a report.
    """

    rest_seconds: float = 1.0
    busy_seconds: float = 0.25
    unanswered_seconds: float = 1.0
    report_timeout_seconds: float = 3.0
    deadline_seconds: float = 1.0


DEFAULT_INTERVALS = PollIntervals()


def intervals_of(workers: int) -> PollIntervals:
    """The intervals of a worker: several of them, which share polls, poll a replica at most once a second.

    Each counts its own requests exactly, also between polls; the older a poll, the older is only what it says of the
    others. A single worker has no others here, and polls a busy replica four times a second.
    """
    if workers == 1:
        return DEFAULT_INTERVALS
    seconds = SHARED_POLL_SECONDS / (1 - JITTER)
    return PollIntervals(seconds, seconds)


def next_poll_seconds(
    *, busy: bool, jitter: float, intervals: PollIntervals = DEFAULT_INTERVALS, answered: bool = True
) -> float:
    """From the start of one poll to that of the next; `jitter` is within 0 and 1, `answered` is about the last poll."""
    seconds = intervals.busy_seconds if busy else intervals.rest_seconds
    return (seconds if answered else min(seconds, intervals.unanswered_seconds)) * (1 - JITTER * jitter)


def first_poll_seconds(starting: int, jitter: float, intervals: PollIntervals = DEFAULT_INTERVALS) -> float:
    """The delay of a replica's first poll while `starting` are due; otherwise they would stay in step for ever."""
    return jitter * min(intervals.rest_seconds, starting * START_SECONDS)


def poll_deadline_seconds(unanswered: int, intervals: PollIntervals = DEFAULT_INTERVALS) -> float:
    """How long a poll may take, behind so many that were not answered."""
    return intervals.deadline_seconds * (SLOW_FACTOR if unanswered >= MIN_TIMEOUTS else 1)


def ignore_answers(replica_id: str, answered: bool) -> None:
    """Do nothing."""


@dataclass(slots=True, eq=False)
class MetricsPoller:
    """Polls while the `async with` block runs, with one task for each ready replica.

    `polls` counts them by replica, variant and Outcome. A replica that does not answer is polled as often as any other,
    but has more time for each answer: it may be slow. `on_answer` is told whether a poll was answered at all. With a
    `share`, only some replicas are polled, and answers that other workers get are applied like own polls.
    """

    registry: Registry
    pool: Pool
    observer: PollObserver
    polls: Family[Counter]
    random: Random = field(default_factory=Random)
    intervals: PollIntervals = DEFAULT_INTERVALS
    clock: Callable[[], float] = time.monotonic
    on_answer: OnAnswer = ignore_answers
    share: PollShare | None = None
    _unanswered: dict[str, int] = field(default_factory=dict)  # polls in a row
    _counted: set[str] = field(default_factory=set)  # replicas that `polls` has counters of
    _results: dict[str, PollResult] = field(default_factory=dict)
    _tasks: dict[str, tuple[Replica, asyncio.Task[None]]] = field(default_factory=dict)
    _ending: set[asyncio.Task[None]] = field(default_factory=set)
    _starting: int = 0
    _reported_at: dict[str, float] = field(default_factory=dict)  # by other workers
    _observed: ExitStack = field(default_factory=ExitStack)

    async def __aenter__(self) -> Self:
        if self.share is not None:
            self.share.on_report = self._on_report
            self._observed.enter_context(self.share)
        self._observed.enter_context(self.registry.observed(self._follow_registry))
        self._follow_registry()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._observed.close()
        for replica_id in list(self._tasks):
            self._end(replica_id)
        await asyncio.gather(*self._ending, return_exceptions=True)

    def __repr__(self) -> str:
        return f"<MetricsPoller {len(self._tasks)} replicas>"

    @property
    def results(self) -> Mapping[str, PollResult]:
        """The latest results by replica, of those that were polled since they were ready; a live view."""
        return self._results

    def _follow_registry(self) -> None:
        replicas = (replica for group in self.registry.ready.values() for replica in group)
        ready = {each.id: each for each in replicas if each.base is None and each.external is None}
        for replica_id, (replica, _) in list(self._tasks.items()):
            now = ready.get(replica_id)
            if now is not replica and now != replica:
                self._end(replica_id)
        for replica_id in ready.keys() - self._tasks.keys():
            self._begin(ready[replica_id])
        # Replicas that have left may never return: pods have other names each time.
        for replica_id in [each for each in self._counted if each not in self.registry]:
            self._counted.discard(replica_id)
            self.polls.remove("replica", replica_id)

    def _begin(self, replica: Replica) -> None:
        task = asyncio.create_task(self._follow(replica), name=f"poll {replica.id}")
        task.add_done_callback(_log_error)
        self._tasks[replica.id] = (replica, task)

    def _end(self, replica_id: str) -> None:
        """Forget a replica in this step; its task ends later."""
        _, task = self._tasks.pop(replica_id)
        self._results.pop(replica_id, None)
        self._unanswered.pop(replica_id, None)
        self._reported_at.pop(replica_id, None)
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)
        task.cancel()

    async def _follow(self, replica: Replica) -> None:
        request = metrics_request(replica, self.pool)
        try:
            await self._wait_for_first()
            while True:
                await self._wait_while_reported(replica.id)
                polled_at = self.clock()
                await self._poll(replica, request, polled_at)
                busy = self.observer.busy(replica.id)
                answered, jitter = not self._unanswered.get(replica.id), self.random.random()
                seconds = next_poll_seconds(busy=busy, jitter=jitter, intervals=self.intervals, answered=answered)
                await asyncio.sleep(polled_at + seconds - self.clock())
        finally:
            self.pool.drop(replica.url, replica.tls)

    async def _wait_for_first(self) -> None:
        self._starting += 1
        try:
            await asyncio.sleep(first_poll_seconds(self._starting, self.random.random(), self.intervals))
        finally:
            self._starting -= 1

    async def _poll(self, replica: Replica, request: bytes, polled_at: float) -> None:
        unanswered = self._unanswered.get(replica.id, 0)
        deadline_seconds = poll_deadline_seconds(unanswered, self.intervals)
        report, reason = PollReport(replica.id, polled_at, answered=True), ""
        try:
            status, page = await self._page(replica, request, deadline_seconds)
            if status == 200:
                poll, missing = parse_metrics(page, self.clock())
                report = PollReport(replica.id, polled_at, True, poll, missing)
            else:
                reason = f"status {status}"
        except UpstreamError as error:
            report, reason = PollReport(replica.id, polled_at, answered=False), str(error)
        self._count(replica, "failed" if report.poll is None else "missing" if report.missing else "ok")
        self._apply(replica, report, reason)
        # Without an answer, this worker may be at fault, not the replica: the others find out by themselves.
        if self.share is not None and report.answered:
            self.share.send(report)

    def _on_report(self, report: PollReport) -> None:
        """Apply a poll of another worker, if its replica is ready here."""
        known = self._tasks.get(report.replica_id)
        if known is not None:
            self._reported_at[report.replica_id] = self.clock()
            self._apply(known[0], report, "as another worker has found")

    async def _wait_while_reported(self, replica_id: str) -> None:
        """Wait until this worker has to poll a replica by itself."""
        if self.share is None or self.share.is_poller(replica_id):
            return
        reported_at = self._reported_at.setdefault(replica_id, self.clock())
        while (left := reported_at + self.intervals.report_timeout_seconds - self.clock()) > 0:
            await asyncio.sleep(left)
            reported_at = self._reported_at[replica_id]

    def _apply(self, replica: Replica, report: PollReport, reason: str) -> None:
        """Pass on what a poll says; `reason` is why it says nothing."""
        self._unanswered[replica.id] = 0 if report.answered else self._unanswered.get(replica.id, 0) + 1
        if report.poll is None:
            self._failed(replica, reason)
        else:
            self._read(replica, report.polled_at, report.poll, report.missing)
        self.on_answer(replica.id, report.answered)

    async def _page(self, replica: Replica, request: bytes, deadline_seconds: float) -> tuple[int, bytes]:
        try:
            async with asyncio.timeout(deadline_seconds):
                with await self.pool.open(replica.url, request, tls=replica.tls) as reply:
                    return reply.status, await reply.read(PAGE_LIMIT_BYTES)
        except TimeoutError as error:
            raise UpstreamTimeout(f"no complete page after {deadline_seconds:g} s") from error

    def _failed(self, replica: Replica, reason: str) -> None:
        before = self._results.get(replica.id) or PollResult()
        if before.answers:
            text = "replica %s: cannot read its metrics (%s); its load is unknown until %s/metrics answers again"
            log.warning(text, replica.id, reason, replica.url)
        self._results[replica.id] = before.unanswered()
        self.observer.poll_failed(replica.id)

    def _read(self, replica: Replica, polled_at: float, poll: EngineMetrics, missing: frozenset[str]) -> None:
        before = self._results.get(replica.id) or PollResult()
        _log_changes(replica, before, missing)
        self._results[replica.id] = PollResult(poll, polled_at if poll.tells_load else before.polled_at, missing)
        if poll.tells_load:
            self.observer.polled(replica.id, polled_at, poll)
        else:
            self.observer.poll_failed(replica.id)

    def _count(self, replica: Replica, outcome: Outcome) -> None:
        if replica.id not in self._results:
            self._counted.add(replica.id)
            for each in get_args(Outcome):  # a first failure is a step from 0 then
                self.polls.exists(replica.id, replica.variant, each)
        self.polls.labels(replica.id, replica.variant, outcome).inc()


def metrics_request(replica: Replica, pool: Pool) -> bytes:
    """Encode the request for a replica's metrics."""
    credential = f"authorization: Bearer {replica.api_key}\r\n" if replica.api_key else ""
    return f"GET /metrics HTTP/1.1\r\nhost: {pool.address(replica.url).authority}\r\n{credential}\r\n".encode()


def _log_error(task: asyncio.Task[None]) -> None:
    """Log a defect when it happens: the task is kept, so asyncio would report it only at the end."""
    if not task.cancelled() and (error := task.exception()):
        log.error("the task %r has ended; restart the gateway and report this", task.get_name(), exc_info=error)


def _log_changes(replica: Replica, before: PollResult, missing: frozenset[str]) -> None:
    """Log what changed since the last poll."""
    if not before.answers:
        log.info("replica %s: its metrics can be read again", replica.id)
    known = before.missing or frozenset()
    for name in sorted(missing - known):
        text = "replica %s: no value for %s in its metrics: its load is unknown there; vLLM may have renamed it"
        log.warning(text, replica.id, name)
    for name in sorted(known - missing):
        log.info("replica %s: %s is in its metrics again", replica.id, name)
