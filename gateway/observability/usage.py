"""Adds up what requests use in memory, and writes it to the state database every FLUSH_SECONDS.

A batch that is written keeps its number until the database has confirmed it, so nothing is counted twice. While the
database is away, usage stays in memory; a process that is killed loses that of at most FLUSH_SECONDS.
"""

import asyncio
import logging
import os
import secrets
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from math import isfinite
from types import TracebackType
from typing import Self

from gateway.observability.access_log import AccessRecord
from gateway.observability.metrics import Metrics
from serving.defects import logged_defects
from serving.errors import StateAway
from serving.state.database import StateDatabase
from serving.state.link import Link
from serving.state.usage import HOUR_SECONDS, HOURS_PER_DAY, Dimension, Usage, UsageDatabase, UsageGroup, UsageRow

log = logging.getLogger(__name__)

FLUSH_SECONDS = 10.0
# About 10 MiB. While the database is away, each hour has a row for each key, alias and precision that were used.
MAX_ROWS = 20_000
# So that a batch takes a fraction of a second, and other writers of SQLite wait no longer.
MAX_BATCH_ROWS = 1000
# Engines and providers report tokens; a database adds up integers of 64 bits.
MAX_TOKENS = 2**40
# Tries to write what is left at the end; each has the deadline of `Link`.
LAST_ATTEMPTS = 3

RowKey = tuple[int, str, str, str]


class UsageCounts:
    """The counts of one row, before they are written."""

    __slots__ = ("completion_tokens", "errors", "external_cost_usd", "prompt_tokens", "requests", "seconds")

    def __init__(self) -> None:
        self.requests = self.errors = self.prompt_tokens = self.completion_tokens = 0
        self.seconds = self.external_cost_usd = 0.0

    def add(self, record: AccessRecord) -> None:
        """Count a request."""
        self.requests += 1
        self.errors += record.code != "200"
        self.prompt_tokens += min(max(record.prompt_tokens, 0), MAX_TOKENS)
        self.completion_tokens += min(max(record.completion_tokens, 0), MAX_TOKENS)
        self.seconds += record.seconds
        if isfinite(record.external_cost_usd):
            self.external_cost_usd += max(record.external_cost_usd, 0.0)

    def total(self) -> Usage:
        """As a value."""
        return Usage(
            *(self.requests, self.errors, self.prompt_tokens, self.completion_tokens),
            *(self.seconds, self.external_cost_usd),
        )


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows that are being written; the number is the worker's own."""

    number: int
    rows: tuple[UsageRow, ...]

    @property
    def requests(self) -> int:
        """The requests in it."""
        return sum(row.usage.requests for row in self.rows)


class UsageRecorder:
    """Records usage while the `async with` block runs; `add` is a LogSink.

    `worker` names this process, and no other one ever. Rows are removed after `keep_days`.
    """

    def __init__(
        self,
        link: Link,
        worker: str,
        keep_days: int,
        metrics: Metrics,
        flush_seconds: float = FLUSH_SECONDS,
        max_rows: int = MAX_ROWS,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.away: str | None = None  # why the database cannot be written
        self._link = link
        self._database = UsageDatabase(link.database)
        self._worker = worker
        self._keep_hours = keep_days * HOURS_PER_DAY
        self._pending = metrics.usage_pending
        self._lost = metrics.usage_lost
        self._flush_seconds = flush_seconds
        self._wall_clock = wall_clock
        self._max_rows = max_rows
        self._rows: dict[RowKey, UsageCounts] = {}
        self._batch: Batch | None = None
        self._number = 0
        self._pruned_hour = 0
        self._one_at_a_time = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Start to write regularly."""
        self._task = asyncio.create_task(self._flush_regularly(), name="write usage")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write what was not written yet."""
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        for _ in range(1 if self.away else LAST_ATTEMPTS):
            await self.flush()
            if not self._pending.value:
                break
        else:
            log.error("%s; the usage of %d requests is lost", self.away, self._pending.value)
        self._link.close()

    async def flush(self) -> None:
        """Write all that was counted before the call; while the database is away, it stays in memory."""
        try:
            await self._flush()
        except StateAway as away:
            if self.away is None:
                log.warning("%s; usage is kept in memory; retrying", away)
            self.away = str(away)
            return
        if self.away is not None:
            log.info("usage is written to %s again", self._link.database.engine.name)
        self.away = None

    def add(self, record: AccessRecord, at_seconds: float) -> None:
        """Count a request that ended at `at_seconds` since 1970."""
        key = int(at_seconds) // HOUR_SECONDS, record.key, record.alias, record.precision
        counts = self._rows.get(key)
        if counts is None:
            if len(self._rows) >= self._max_rows:
                self._lost.inc()
                return
            counts = self._rows[key] = UsageCounts()
        counts.add(record)
        self._pending.value += 1

    async def grouped(self, by: Sequence[Dimension], since_hour: int, until_hour: int) -> tuple[UsageGroup, ...]:
        """Write what this process has counted, and read the usage of all; StateAway if either is not possible."""
        await self._flush()
        return await self._link.call(self._database.grouped, by, since_hour, until_hour)

    async def external_cost_today(self) -> dict[str, float]:
        """What each alias has cost since midnight (UTC), in US dollars, by all processes; empty if nobody knows."""
        now_hour = int(self._wall_clock()) // HOUR_SECONDS
        midnight_hour = now_hour - now_hour % HOURS_PER_DAY
        try:
            groups = await self.grouped(("alias",), midnight_hour, now_hour + 1)
        except StateAway as away:
            log.warning("%s; what external models have cost today is unknown", away)
            return {}
        return {group.alias: cost for group in groups if group.alias and (cost := group.usage.external_cost_usd)}

    async def _flush_regularly(self) -> None:
        while True:
            await asyncio.sleep(self._flush_seconds)
            with logged_defects("recording usage"):
                await self.flush()
                if self._number and self.away is None:  # a database that nothing is written to is not created
                    await self._prune()

    async def _flush(self) -> None:
        """Write all that was counted before the call."""
        async with self._one_at_a_time:
            if self._batch is not None:
                await self._write(self._batch)
            for _ in range(0, len(self._rows), MAX_BATCH_ROWS):
                await self._write(self._next_batch())

    def _next_batch(self) -> Batch:
        keys = tuple(islice(self._rows, MAX_BATCH_ROWS))
        rows = tuple(UsageRow(*key, self._rows.pop(key).total()) for key in keys)
        self._number += 1
        self._batch = Batch(self._number, rows)
        return self._batch

    async def _write(self, batch: Batch) -> None:
        await self._link.call(self._database.add, self._worker, batch.number, batch.rows, self._wall_clock())
        self._batch = None
        self._pending.value -= batch.requests

    async def _prune(self) -> None:
        """Remove old rows, once an hour."""
        now = self._wall_clock()
        hour = int(now) // HOUR_SECONDS
        if hour == self._pruned_hour:
            return
        with suppress(StateAway):
            await self._link.call(self._database.prune, self._keep_hours, now)
            self._pruned_hour = hour


@asynccontextmanager
async def recorded_usage(state: str | None, keep_days: int, metrics: Metrics) -> AsyncIterator[UsageRecorder | None]:
    """Record usage in a state database while the block runs; None if there is none, or nothing is to be kept."""
    if state is None or not keep_days:
        yield None
        return
    worker = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(8)}"
    async with UsageRecorder(Link(StateDatabase.at(state, create=False)), worker, keep_days, metrics) as recorder:
        yield recorder
