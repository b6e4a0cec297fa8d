"""Leases of quotas through a real PostgreSQL: gateways share, a database that is away, and one that hangs."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
from sqlalchemy import func, select

from gateway import quota_shares
from gateway.errors import RateLimited
from gateway.keys import Caller
from gateway.observability.metrics.instruments import Gauge
from gateway.quota import Quota
from gateway.quota_leases import LEASE_SECONDS, QuotaLeases, renewal_seconds
from gateway.quota_shares import decoded
from serving.state.database import StateDatabase
from serving.state.link import Link
from serving.state.tables import QUOTAS
from tests.fakes.running import eventually
from tests.serving.state.conftest import postgresql
from tests.serving.state.databases import PostgreSQL, away

__all__ = ["postgresql"]

CALLER = Caller("key", requests_per_minute=60)


@dataclass
class Gateway:
    """What a gateway has of quotas."""

    quota: Quota
    leases: QuotaLeases
    local: Gauge = field(default_factory=Gauge)

    def admitted(self, requests: int) -> int:
        """Send requests at once; return how many are admitted."""
        count, now = 0, asyncio.get_running_loop().time()
        for _ in range(requests):
            try:
                self.quota.admit(CALLER, now)
            except RateLimited:
                continue
            count += 1
        return count

    def remaining(self) -> int:
        """How many requests it would admit now."""
        return int(
            dict(self.quota.headers(CALLER, asyncio.get_running_loop().time()))[b"x-ratelimit-remaining-requests"]
        )


@asynccontextmanager
async def running(url: str, lease_seconds: float = 60, renew_seconds: float = 0.05) -> AsyncIterator[Gateway]:
    """A gateway that renews its lease often."""
    quota, local = Quota(), Gauge()
    link = Link(StateDatabase.at(url), 0.5)
    leases = QuotaLeases(link, quota, local, renew_seconds=renew_seconds, lease_seconds=lease_seconds)
    async with leases:
        yield Gateway(quota, leases, local)


def level(url: str) -> float:
    """How many requests the bucket of the key has, by the reports in the database."""
    database = StateDatabase.at(url)
    with database.reading() as connection:
        assert connection is not None
        document = connection.scalar(select(QUOTAS.c.document))
        now = float(connection.scalar(select(func.extract("epoch", func.clock_timestamp()))) or 0.0)
    database.close()
    quota = decoded(document)
    return 60.0 if quota is None else quota_shares.level(60, quota.requests_full_at, now)


async def test_two_gateways_share_a_limit(postgresql: PostgreSQL) -> None:
    """Each has half of what nobody has used; what one admits, the other one does not admit again."""
    url = postgresql.new_database()
    async with running(url) as first, running(url) as second:
        await eventually(lambda: first.quota.share == second.quota.share == 0.5)
        admitted = first.admitted(100)
        assert admitted == 30

        def all_admitted() -> bool:
            nonlocal admitted
            admitted += first.admitted(5)
            return admitted > 55

        await eventually(all_admitted)
        assert admitted + second.admitted(100) < 70  # it refills
    async with running(url) as third:
        assert third.quota.share == 1
        assert third.admitted(100) < 10


async def test_the_share_of_a_gateway_that_leaves(postgresql: PostgreSQL) -> None:
    """Is the others' at their next report."""
    url = postgresql.new_database()
    async with running(url) as first:
        async with running(url):
            await eventually(lambda: first.quota.share == 0.5)
        await eventually(lambda: first.quota.share == 1)


@pytest.mark.parametrize("how", ["stopped", "frozen"])
async def test_a_database_that_is_away(postgresql: PostgreSQL, how: str, caplog: pytest.LogCaptureFixture) -> None:
    """The lease stays in force until it ends; then a fixed share is admitted, which is charged when it is back."""
    caplog.set_level(logging.INFO)
    url = postgresql.new_database()
    async with running(url, lease_seconds=1.5) as first, running(url, lease_seconds=1.5) as second:
        await eventually(lambda: first.quota.share == second.quota.share == 0.5)
        caplog.clear()
        first.admitted(1)
        await eventually(lambda: 58 < level(url) < 59.9)
        with away(postgresql, how):
            assert (first.local.value, first.admitted(1)) == (0, 1)
            await eventually(lambda: first.local.value == second.local.value == 1)
            assert 25 <= second.admitted(100) <= 31
        await eventually(lambda: first.local.value == second.local.value == 0)
        await eventually(lambda: first.remaining() + second.remaining() <= 40)
        assert first.admitted(100) + second.admitted(100) <= 50
    assert caplog.text.count("quotas are not shared, this process admits 50% of each limit") == 2
    assert caplog.text.count("quotas are shared again through") == 2


@pytest.mark.parametrize(
    "report_seconds, workers, seconds",
    [(0.005, 4, 1), (0.01, 40, 1), (0.1, 8, 1.6), (0.2, 6, 2.4), (0.3, 20, 3)],
)
def test_leases_are_renewed_less_often_if_that_takes_long(report_seconds: float, workers: int, seconds: float) -> None:
    """All together keep the database busy for half of the time, as long as a lease lasts."""
    assert renewal_seconds(1, report_seconds, workers) == pytest.approx(seconds)
    assert seconds < LEASE_SECONDS


async def test_a_gateway_that_starts_while_the_database_is_away(postgresql: PostgreSQL) -> None:
    """It admits all of each limit, since it knows of nobody else, and says so."""
    url = postgresql.new_database()
    with away(postgresql, "stopped"):
        async with running(url) as alone:
            assert (alone.local.value, alone.admitted(100)) == (1, 60)


async def test_a_gateway_that_joins(postgresql: PostgreSQL) -> None:
    """It admits nothing before the others hold less of a key that nobody uses, not even once twice the limit."""
    url = postgresql.new_database()
    async with running(url, renew_seconds=1) as first, running(url, renew_seconds=1) as second:
        assert first.admitted(100) + second.admitted(100) == 60


async def test_the_first_key_with_limits(postgresql: PostgreSQL) -> None:
    """How many gateways share it is known when it comes; without keys, a lease does not run out."""
    url = postgresql.new_database()
    async with running(url, lease_seconds=0.5) as first, running(url, lease_seconds=0.5) as second:
        await eventually(lambda: first.quota.share == second.quota.share == 0.5)
        now = asyncio.get_running_loop().time()
        await eventually(lambda: asyncio.get_running_loop().time() > now + 1)
        assert (first.local.value, second.local.value) == (0, 0)
        assert first.admitted(100) + second.admitted(100) == 60
