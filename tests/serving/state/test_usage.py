"""Usage in the state database, of both kinds: sums are exact, whoever writes them and however often."""

import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
from alembic.migration import MigrationContext
from alembic.operations import Operations
from sqlalchemy import select, text

from serving.errors import TooMuchUsage
from serving.state.database import StateDatabase
from serving.state.migrations.versions import v2_replicas, v3_rollouts
from serving.state.tables import SCHEMA_VERSION, STATE, USAGE_BATCHES
from serving.state.usage import (
    HOUR_SECONDS,
    KEEP_BATCHES_SECONDS,
    STATEMENT_ROWS,
    Dimension,
    Usage,
    UsageDatabase,
    UsageGroup,
    UsageRow,
)
from tests.serving.state.databases import PostgreSQL

NOW = 1_800_000_000.0
HOUR = int(NOW // 3600)
ROW = UsageRow(HOUR, "team-a", "smol", "bf16", Usage(2, 1, 30, 4, 1.5, 0.25))


@pytest.fixture
def database(state: str) -> Iterator[UsageDatabase]:
    database = UsageDatabase(StateDatabase.at(state))
    yield database
    database.database.close()


def total(database: UsageDatabase) -> Usage:
    """All usage."""
    groups = database.grouped((), 0, HOUR + 1)
    return groups[0].usage if groups else Usage()


def test_rows_add_up(database: UsageDatabase) -> None:
    """Two workers add to one row."""
    database.add("w1", 1, [ROW], NOW)
    database.add("w2", 1, [ROW], NOW)
    database.add("w1", 2, [ROW], NOW)
    assert total(database) == Usage(6, 3, 90, 12, 4.5, 0.75)


def test_a_batch_is_added_once(database: UsageDatabase) -> None:
    """One that is repeated, because nobody knows whether it was written, changes nothing; the next one does."""
    for batch in (1, 1, 2, 2, 1):
        database.add("w1", batch, [ROW], NOW)
    assert total(database).requests == 4


@pytest.mark.parametrize(
    "by,expected",
    [
        ((), [(None, None, None, None, 15)]),
        (("key",), [(None, "a", None, None, 7), (None, "b", None, None, 8)]),
        (("alias", "precision"), [(None, None, "x", "int4", 8), (None, None, "x", "int8", 7)]),
        (("hour",), [(HOUR - 30, None, None, None, 1), (HOUR - 1, None, None, None, 2), (HOUR, None, None, None, 12)]),
        (("day",), [(HOUR - 30 - (HOUR - 30) % 24, None, None, None, 1), (HOUR - HOUR % 24, None, None, None, 14)]),
    ],
)
def test_groups(
    database: UsageDatabase, by: tuple[Dimension, ...], expected: list[tuple[int | None, str | None, str, str, int]]
) -> None:
    """Usage is grouped by any of the dimensions, in order."""
    one = replace(ROW, alias="x", precision="int8", key="a")
    rows = [
        replace(one, hour=HOUR - 30, usage=Usage(1)),
        replace(one, hour=HOUR - 1, usage=Usage(2)),
        replace(one, usage=Usage(4)),
        replace(one, key="b", precision="int4", usage=Usage(8)),
    ]
    database.add("w", 1, rows, NOW)
    groups = database.grouped(by, 0, HOUR + 1)
    assert [(each.hour, each.key, each.alias, each.precision, each.usage.requests) for each in groups] == expected


def test_time_and_limit(database: UsageDatabase) -> None:
    """The last hour is excluded, nothing is no row, and too many rows are an error that says what to do."""
    database.add("w", 1, [ROW, replace(ROW, hour=HOUR + 1), replace(ROW, hour=HOUR + 2)], NOW)
    assert database.grouped(("hour",), HOUR, HOUR + 1) == (UsageGroup(ROW.usage, hour=HOUR),)
    assert database.grouped((), 0, HOUR) == ()
    assert len(database.grouped(("hour",), HOUR, HOUR + 2, max_rows=2)) == 2
    with pytest.raises(TooMuchUsage, match="choose a shorter time"):
        database.grouped(("hour",), HOUR, HOUR + 3, max_rows=2)


def test_old_rows_are_removed(database: UsageDatabase) -> None:
    """And numbers of batches that nothing repeats."""
    now = time.time()
    hour = int(now) // HOUR_SECONDS
    database.add("old", 1, [replace(ROW, hour=hour - 100)], now - KEEP_BATCHES_SECONDS - 60)
    database.add("new", 1, [replace(ROW, hour=hour - 98)], now)
    database.prune(99, now)
    assert [group.hour for group in database.grouped(("hour",), 0, hour + 1)] == [hour - 98]
    with database.database.reading() as connection:
        assert connection is not None
        assert connection.scalars(select(USAGE_BATCHES.c.worker)).all() == ["new"]


def test_a_wrong_clock_removes_nothing_of_others(postgresql: PostgreSQL) -> None:
    """Rows are as old as the database server says, where there is one for many machines."""
    database = UsageDatabase(StateDatabase.at(postgresql.new_database()))
    now = time.time()
    database.add("w", 1, [replace(ROW, hour=int(now) // HOUR_SECONDS)], now)
    database.prune(99, now + 365 * 86400)
    assert len(database.grouped(("hour",), 0, int(now) // HOUR_SECONDS + 1)) == 1
    database.database.close()


def test_a_batch_of_many_rows(database: UsageDatabase) -> None:
    """It takes several statements; a repeated row is added up, not replaced."""
    rows = [replace(ROW, key=f"k{number}") for number in range(2 * STATEMENT_ROWS + 1)]
    for worker in ("w1", "w2"):
        database.add(worker, 1, rows, NOW)
    assert total(database).requests == 2 * 2 * len(rows)


def test_nothing_is_created_by_reading(state: str) -> None:
    """A report of a database without tables is empty."""
    database = StateDatabase.at(state, create=False)
    assert UsageDatabase(database).grouped((), 0, HOUR) == ()
    database.close()


def test_workers_write_at_once(state: str) -> None:
    """Nothing is lost, counted twice or blocked when several processes add to the same rows."""
    rows = [replace(ROW, key=key, hour=HOUR - age) for key in "abc" for age in range(3)]
    problems = []

    def work(name: str) -> None:
        own = UsageDatabase(StateDatabase.at(state))
        try:
            for batch in range(1, 11):
                own.add(name, batch, rows if batch % 2 else rows[::-1], NOW)
        except Exception as error:  # noqa: BLE001 - shown by the assertion
            problems.append(error)
        own.database.close()

    threads = [threading.Thread(target=work, args=(f"w{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    database = UsageDatabase(StateDatabase.at(state))
    assert problems == []
    assert total(database).requests == 4 * 10 * len(rows) * ROW.usage.requests
    database.database.close()


def test_a_database_of_version_3_is_upgraded(state: str) -> None:
    """It gets the tables of usage, and keeps what it has."""
    database = StateDatabase.at(state)
    with (
        database.engine.transaction(writing=True) as connection,
        Operations.context(MigrationContext.configure(connection)),
    ):
        v2_replicas.upgrade()
        row = "INSERT INTO quantgate_state (id, version, epoch, revision) VALUES (1, 2, 'old', 41)"
        connection.execute(text(row))
        v3_rollouts.upgrade()
        connection.execute(text("CREATE TABLE quantgate_schema (version_num VARCHAR(32) NOT NULL PRIMARY KEY)"))
        connection.execute(text("INSERT INTO quantgate_schema VALUES (:version)"), {"version": "3"})
    UsageDatabase(database).add("w", 1, [ROW], NOW)
    assert total(UsageDatabase(database)) == ROW.usage
    with database.reading() as found:
        assert found is not None
        assert found.execute(select(STATE.c.version, STATE.c.epoch)).one() == (SCHEMA_VERSION, "old")
    database.close()
