"""Shares the limits of API keys with other gateways, by leases of the state database, renewed about each second.

No request waits for the database. A lease is short: what this process may use of a key until it is renewed.

=====================================  ======================================================================
the database                           limits in this process
=====================================  ======================================================================
answers                                what this process holds by `quota_shares`
has been away for < LEASE_SECONDS      the same
has been away for longer               1/N of each limit, N: the gateway workers that were last known
answers again                          what it holds; what was used meanwhile is charged
=====================================  ======================================================================
"""

import asyncio
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Self

from gateway.observability.metrics.instruments import Gauge
from gateway.quota import Quota
from gateway.quota_shares import RENEW_SECONDS, Report, changes, decoded
from serving.defects import logged_defects
from serving.errors import StateAway
from serving.state.link import Link
from serving.state.quotas import QuotaTable

log = logging.getLogger(__name__)

# By this process' monotonic clock, from before the database was asked; it removes a worker after EXPIRE_SECONDS.
LEASE_SECONDS = 5.0
# A renewal takes longer the more keys are used, one worker at a time: so much of the time, together, and they are
# renewed less often before it is more. LONGEST_RENEW_SECONDS and an exchange end before the lease.
RENEW_LOAD = 0.5
LONGEST_RENEW_SECONDS = 3.0
# A worker that joins waits for so many renewals of the others before its first request.
JOIN_RENEWALS = 1.5
# Of one exchange: less than a lease, so that a database that hangs once does not end it.
CALL_SECONDS = 2.0


def renewal_seconds(least_seconds: float, report_seconds: float, workers: int) -> float:
    """Return the time between two reports of a worker, of which each keeps the others waiting for `report_seconds`."""
    return max(least_seconds, min(report_seconds * workers / RENEW_LOAD, LONGEST_RENEW_SECONDS))


class QuotaLeases:
    """Renews what this process holds of the keys' limits while the `async with` block runs.

    `local` is 1 while there is no lease. A lease is renewed without keys that have limits, too: the first one may come
    at any time, and how many gateways share it is known then.
    """

    def __init__(
        self,
        link: Link,
        quota: Quota,
        local: Gauge,
        clock: Callable[[], float] = time.monotonic,
        renew_seconds: float = RENEW_SECONDS,
        lease_seconds: float = LEASE_SECONDS,
    ) -> None:
        self.worker = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(8)}"
        self._link = link
        self._table = QuotaTable(link.database)
        self._quota = quota
        self._local = local
        self._clock = clock
        self._least_renew_seconds = self._renew_seconds = renew_seconds
        self._lease_seconds = lease_seconds
        self._batch = 0
        self._report: Report | None = None  # sent, and not confirmed
        self._report_since = self._counted_since = clock()
        self._expiry: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Take part before the first request; an unavailable database is no error.

        A process that joins others waits until they have reported: their parts of unused keys are still those of the
        former number of workers.
        """
        await self.renew()
        if self._expiry is not None and self._quota.share < 1:
            await asyncio.sleep(JOIN_RENEWALS * self._renew_seconds)
            await self.renew()
        self._task = asyncio.create_task(self._renew_regularly(), name="renew shares of quotas")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Report what was used last, and leave what is held to others."""
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        if self._expiry is not None:
            self._expiry.cancel()
            try:
                await self._link.call(self._table.leave, self.worker, *self._next())
            except StateAway as away:
                log.warning("%s; other gateways get this one's share of quotas later", away)
        self._link.close()

    async def renew(self) -> None:
        """Report what was used, and hold what this process gets; while the database is away, the lease runs out."""
        repeated = self._report is not None
        try:
            await self._exchange()
            if repeated:  # what was used since its first attempt is in no report yet
                await self._exchange()
        except StateAway as away:
            if self._expiry is None:
                self._end_lease(str(away))

    async def _renew_regularly(self) -> None:
        while True:
            await asyncio.sleep(self._renew_seconds)
            with logged_defects("sharing quotas"):
                await self.renew()

    async def _exchange(self) -> None:
        asked_at = self._clock()
        records = await self._link.call(self._table.report, self.worker, *self._next())
        self._report = None
        workers = len(records.workers)
        self._renew_seconds = renewal_seconds(self._least_renew_seconds, records.report_seconds, workers)
        quotas = {name: quota for name, document in records.documents.items() if (quota := decoded(document))}
        self._quota.hold(self.worker, quotas, 1 / workers, self._clock())
        self._begin_lease(asked_at + self._lease_seconds - self._clock())

    def _next(self) -> tuple[int, object]:
        """Return the number of the report to send and what it changes; one that is not confirmed is sent again."""
        if self._report is None:
            self._report = self._quota.take_report()
            self._report_since, self._counted_since = self._counted_since, self._clock()
            self._batch += 1
        age_seconds = self._clock() - self._report_since
        return self._batch, partial(changes, worker=self.worker, report=self._report, age_seconds=age_seconds)

    def _begin_lease(self, seconds: float) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
        elif self._local.value:
            log.info("quotas are shared again through %s", self._link.database.engine.name)
        self._local.value = 0.0
        reason = f"the state database {self._link.database.engine.name} has not answered for {self._lease_seconds:g} s"
        self._expiry = asyncio.get_running_loop().call_later(seconds, self._end_lease, reason)

    def _end_lease(self, reason: str) -> None:
        self._expiry = None
        self._quota.hold_share()
        if not self._local.value:
            share = f"{self._quota.share:.0%} of each limit"
            log.warning("%s; quotas are not shared, this process admits %s; retrying", reason, share)
        self._local.value = 1.0
