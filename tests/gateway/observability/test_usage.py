"""Usage: counted in memory, written in batches that count once, kept while the database is away."""

import logging
import sqlite3
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest

from gateway.observability.metrics import Metrics
from gateway.observability.usage import MAX_BATCH_ROWS, MAX_TOKENS, UsageRecorder
from gateway.observability.usage_report import UsageQuery, parse_by, parse_query, parse_time, usage_report
from serving.errors import StateAway
from serving.state.database import StateDatabase
from serving.state.link import Link
from serving.state.usage import Usage, UsageDatabase, UsageGroup
from tests.fakes.running import eventually
from tests.gateway.observability.records import RECORD
from tests.serving.state.databases import PostgreSQL, away

NOW = 1_800_000_000.0
HOUR = int(NOW // 3600)


@dataclass
class Recording:
    """Makes recorders of one database."""

    state: str
    metrics: Metrics = field(default_factory=Metrics)

    def recorder(
        self, worker: str = "w1", *, flush_seconds: float = 1000.0, max_rows: int = 1000, call_seconds: float = 5.0
    ) -> UsageRecorder:
        """A recorder that writes when it is asked for usage, and at its end."""
        link = Link(StateDatabase.at(self.state, create=False), call_seconds)
        return UsageRecorder(link, worker, 10, self.metrics, flush_seconds, max_rows, lambda: NOW)

    def create(self) -> None:
        """Create the tables."""
        database = StateDatabase.at(self.state)
        database.heartbeat()
        database.close()

    def requests(self) -> int:
        """All requests in the database."""
        database = StateDatabase.at(self.state, create=False)
        groups = UsageDatabase(database).grouped((), 0, HOUR + 1)
        database.close()
        return groups[0].usage.requests if groups else 0


async def test_usage_of_several_workers(state: str) -> None:
    """Each adds what it has counted when it is asked, and at its end."""
    one = Recording(state)
    async with one.recorder("w1") as first, one.recorder("w2") as second:
        for recorder in (first, second, second):
            recorder.add(RECORD, NOW)
        second.add(msgspec.structs.replace(RECORD, code="499", key="team-b", external_cost_usd=0.5), NOW)
        assert [each.usage.requests for each in await first.grouped((), 0, HOUR + 1)] == [1]
        assert one.metrics.usage_pending.value == 3
    assert one.metrics.usage_pending.value == 0
    async with one.recorder("w3") as third:
        groups = await third.grouped(("key",), 0, HOUR + 1)
    assert groups == (
        UsageGroup(Usage(3, 0, 30, 9, 3 * RECORD.seconds, 0.0), key="team-a"),
        UsageGroup(Usage(1, 1, 10, 3, RECORD.seconds, 0.5), key="team-b"),
    )


async def test_usage_is_written_regularly(tmp_path: Path) -> None:
    """Without being asked, and a batch at a time."""
    one = Recording(f"sqlite:///{tmp_path}/state.db")
    one.create()
    async with one.recorder(flush_seconds=0.05, max_rows=3 * MAX_BATCH_ROWS) as recorder:
        for number in range(2 * MAX_BATCH_ROWS + 1):
            recorder.add(msgspec.structs.replace(RECORD, key=f"k{number}"), NOW)
        await eventually(lambda: one.requests() == 2 * MAX_BATCH_ROWS + 1)


async def test_absurd_reports_of_engines(state: str) -> None:
    """They are cut to what a database can add up; the next request is recorded as well."""
    one = Recording(state)
    async with one.recorder() as recorder:
        recorder.add(msgspec.structs.replace(RECORD, prompt_tokens=2**70, external_cost_usd=float("nan")), NOW)
        recorder.add(msgspec.structs.replace(RECORD, completion_tokens=-5, external_cost_usd=-1.0), NOW)
        (group,) = await recorder.grouped((), 0, HOUR + 1)
    assert group.usage.prompt_tokens == MAX_TOKENS + RECORD.prompt_tokens
    assert (group.usage.completion_tokens, group.usage.external_cost_usd) == (RECORD.completion_tokens, 0.0)


async def test_the_database_is_away(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Usage stays in memory, up to a limit beyond which it is counted as lost; a log line says so, once."""
    caplog.set_level(logging.INFO)
    one = Recording(f"sqlite:///{tmp_path}/later/state.db")
    async with one.recorder(flush_seconds=0.05, max_rows=2) as recorder:
        recorder.add(RECORD, NOW)
        await eventually(lambda: recorder.away)
        with pytest.raises(StateAway):
            await recorder.grouped((), 0, HOUR + 1)
        for key in ("a", "b", "c", "b"):
            recorder.add(msgspec.structs.replace(RECORD, key=key), NOW)
        assert (one.metrics.usage_pending.value, one.metrics.usage_lost.value) == (4, 1)
        (tmp_path / "later").mkdir()
        await eventually(lambda: recorder.away is None)
        assert one.requests() == 4
    assert one.metrics.usage_pending.value == 0
    told = [record.message for record in caplog.records if "usage" in record.message]
    assert [message.rpartition("; ")[2] for message in told[:1]] == ["retrying"]
    assert told[1:] == [f"usage is written to sqlite:///{tmp_path}/later/state.db again"]


async def test_external_cost_of_a_day(state: str, tmp_path: Path) -> None:
    """By alias, of all workers and since midnight; a database that is away knows nothing."""
    one = Recording(state)
    midnight = NOW - NOW % 86400
    paid = msgspec.structs.replace(RECORD, external_cost_usd=0.25)
    async with one.recorder("w1") as first, one.recorder("w2") as second:
        first.add(msgspec.structs.replace(paid, alias="before"), midnight - 1)
        first.add(msgspec.structs.replace(paid, alias="free", external_cost_usd=0.0), NOW)
        first.add(paid, midnight)
        first.add(paid, NOW)
        await first.grouped((), 0, 1)
        second.add(msgspec.structs.replace(paid, alias="gpt"), NOW)
        assert await second.external_cost_today() == {"smol": 0.5, "gpt": 0.25}
    async with Recording(f"sqlite:///{tmp_path}/never/state.db").recorder() as recorder:
        recorder.add(paid, NOW)
        assert await recorder.external_cost_today() == {}


async def test_a_database_that_stays_away(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A gateway that stops meanwhile says how much is lost."""
    async with Recording(f"sqlite:///{tmp_path}/never/state.db").recorder() as recorder:
        recorder.add(RECORD, NOW)
    assert caplog.messages[-1].endswith("the usage of 1 requests is lost")


async def test_a_server_that_stops(postgresql: PostgreSQL) -> None:
    """What was counted while PostgreSQL was down is there afterwards."""
    one = Recording(postgresql.new_database())
    async with one.recorder(flush_seconds=0.1) as recorder:
        recorder.add(RECORD, NOW)
        await eventually(lambda: one.requests() == 1)
        with away(postgresql, "stopped"):
            recorder.add(RECORD, NOW)
            await eventually(lambda: recorder.away)
            recorder.add(RECORD, NOW)
        await eventually(lambda: recorder.away is None)
        assert one.requests() == 3


async def test_a_write_whose_outcome_is_unknown(tmp_path: Path) -> None:
    """A batch that missed its deadline and was written all the same is not added again."""
    file = tmp_path / "state.db"
    one = Recording(f"sqlite:///{file}")
    assert one.requests() == 0
    async with one.recorder(call_seconds=0.2) as recorder:
        recorder.add(RECORD, NOW)
        await recorder.grouped((), 0, HOUR + 1)
        with closing(sqlite3.connect(file, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            recorder.add(RECORD, NOW)
            with pytest.raises(StateAway, match="no answer within"):
                await recorder.grouped((), 0, HOUR + 1)
            other.execute("COMMIT")
        recorder.add(RECORD, NOW)
        await eventually(lambda: one.requests() == 2)
        assert one.metrics.usage_pending.value == 2
        (group,) = await recorder.grouped((), 0, HOUR + 1)
    assert group.usage.requests == 3
    assert one.metrics.usage_pending.value == 0


@pytest.mark.parametrize(
    "text,seconds",
    [
        ("90m", NOW - 5400),
        ("1d", NOW - 86400),
        ("4w", NOW - 28 * 86400),
        ("2027-01-15", 1_799_971_200.0),
        ("2027-01-15T08:00", NOW),
        ("2027-01-15T10:00+02:00", NOW),
        ("999999w", 0.0),
    ],
)
def test_times(text: str, seconds: float) -> None:
    """Ages count from now; dates and times are UTC."""
    assert parse_time(text, NOW) == seconds


@pytest.mark.parametrize("text", ["", "1", "1y", "yesterday", "-1d", "2027-13-01", "1d; DROP"])
def test_invalid_times(text: str) -> None:
    """The message says what to write."""
    with pytest.raises(ValueError, match="is not a time; write 6h, 1d"):
        parse_time(text, NOW)


def test_queries() -> None:
    """Whole hours count: the one that is begun, too."""
    assert parse_query("key, alias", "1d", None, NOW + 60) == UsageQuery(("key", "alias"), HOUR - 24, HOUR + 1)
    assert parse_query("", "2027-01-01", "2027-01-02", NOW).until_hour == HOUR - 14 * 24 + 16
    for by, since, until, message in (
        ("key,user", "1d", None, "'user' is not a dimension of usage; write some of day, hour, key"),
        ("key,key", "1d", None, "names a dimension twice"),
        ("day,hour", "1d", None, "both day and hour"),
        ("key", "1h", "2h", r"until \(2h\) is not after since \(1h\)"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_query(by, since, until, NOW)
    assert parse_by("") == ()


def test_report() -> None:
    """The total is the sum of all rows, and times are RFC 3339."""
    groups = (
        UsageGroup(Usage(1, 0, 2, 3, 0.5, 0.25), hour=HOUR, key="a"),
        UsageGroup(Usage(1, 1, 2, 3, 0.25, 0.5), hour=HOUR + 1, key="a"),
    )
    report = usage_report(UsageQuery(("hour", "key"), HOUR, HOUR + 2), groups)
    assert (report.since, report.until) == ("2027-01-15T08:00:00Z", "2027-01-15T10:00:00Z")
    assert [row.start for row in report.rows] == ["2027-01-15T08:00:00Z", "2027-01-15T09:00:00Z"]
    total = report.total
    assert (total.key, total.requests, total.errors, total.prompt_tokens, total.seconds) == (None, 2, 1, 4, 0.75)
    assert total.external_cost_usd == 0.75
