"""Reports of gateway workers about limits, in the state database: one at a time, once each, and who lives."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import select, update

from serving.state.database import StateDatabase
from serving.state.quotas import EXPIRE_SECONDS, QuotaRecords, QuotaTable
from serving.state.tables import QUOTA_WORKERS


def nothing(_: QuotaRecords) -> dict[str, str | None]:
    """A report that changes nothing."""
    return {}


def add_one(records: QuotaRecords) -> dict[str, str | None]:
    """A report that counts itself, unless it was counted before."""
    return {"key": str(int(records.documents.get("key", 0)) + (not records.repeated))}


def test_a_report_is_counted_once(state: str) -> None:
    """One that is sent again, because its answer was lost, is told to be a repetition."""
    database = StateDatabase.at(state)
    table = QuotaTable(database)
    assert table.report("a", 1, add_one).documents == {"key": "1"}
    assert table.report("a", 1, add_one).documents == {"key": "1"}
    assert table.report("a", 2, add_one).documents == {"key": "2"}
    found = table.report("b", 1, add_one)
    assert (found.documents, found.workers) == ({"key": "3"}, ("a", "b"))
    assert found.report_seconds > 0
    assert table.report("b", 2, lambda _: {"key": None}).documents == {}
    database.close()


def test_a_worker_leaves(state: str) -> None:
    """Its last report counts, and it is not among the workers any more."""
    database = StateDatabase.at(state)
    table = QuotaTable(database)
    table.report("a", 1, nothing)
    table.report("b", 1, nothing)
    seen: list[tuple[str, ...]] = []

    def last(records: QuotaRecords) -> dict[str, str | None]:
        seen.append(records.workers)
        return {"key": "last"}

    table.leave("a", 2, last)
    assert seen == [("b",)]
    found = table.report("b", 2, nothing)
    assert (found.documents, found.workers) == ({"key": "last"}, ("b",))
    database.close()


def _turn_back(database: StateDatabase, worker: str, seconds: float) -> None:
    with database.writing() as connection:
        mine = QUOTA_WORKERS.c.worker == worker
        connection.execute(update(QUOTA_WORKERS).where(mine).values(expires_at=QUOTA_WORKERS.c.expires_at - seconds))


def test_who_is_silent_dies(state: str) -> None:
    """While others report."""
    database = StateDatabase.at(state)
    table = QuotaTable(database)
    table.report("a", 1, nothing)
    table.report("b", 1, nothing)
    _turn_back(database, "a", EXPIRE_SECONDS + 1)
    assert table.report("b", 2, nothing).workers == ("b",)
    database.close()


def test_nobody_dies_of_an_outage(state: str) -> None:
    """While nobody could report, nobody was silent; who dies after that is who stays silent."""
    database = StateDatabase.at(state)
    table = QuotaTable(database)
    table.report("a", 1, nothing)
    table.report("b", 1, nothing)
    for worker in "ab":
        _turn_back(database, worker, 3600)
    assert table.report("b", 2, nothing).workers == ("a", "b")
    assert table.report("b", 3, nothing).workers == ("a", "b")
    with database.writing() as connection:
        newest = connection.scalars(select(QUOTA_WORKERS.c.expires_at)).all()
    assert max(newest) - min(newest) < EXPIRE_SECONDS
    _turn_back(database, "a", EXPIRE_SECONDS + 1)
    assert table.report("b", 4, nothing).workers == ("b",)
    database.close()


def test_a_clock_that_was_set_back(state: str) -> None:
    """As by a failover: workers live as long as before, and the step is told once, to whoever reports first."""
    database = StateDatabase.at(state)
    table = QuotaTable(database)
    steps: list[float] = []

    def note(records: QuotaRecords) -> dict[str, str | None]:
        steps.append(records.step_seconds)
        return {}

    table.report("a", 1, note)
    table.report("b", 1, note)
    for worker in "ab":
        _turn_back(database, worker, -3600)
    table.report("b", 2, note)
    table.report("a", 2, note)
    assert steps == [0, 0, pytest.approx(-3600, abs=60), 0]
    _turn_back(database, "a", EXPIRE_SECONDS + 1)
    assert table.report("b", 3, note).workers == ("b",)
    database.close()


def test_a_worker_that_was_removed_is_not_known(state: str) -> None:
    """Its next report says so."""
    database = StateDatabase.at(state)
    table = QuotaTable(database)
    assert [table.report("a", batch, nothing).known for batch in (1, 2)] == [False, True]
    table.report("b", 1, nothing)
    _turn_back(database, "a", EXPIRE_SECONDS + 1)
    table.report("b", 2, nothing)
    found = table.report("a", 3, nothing)
    assert (found.known, found.repeated) == (False, False)
    database.close()


def _report_many(state: str, worker: str) -> None:
    database = StateDatabase.at(state)
    for batch in range(1, 6):
        QuotaTable(database).report(worker, batch, add_one)
    database.close()


def test_one_worker_at_a_time(state: str) -> None:
    """Each sees what those before it have written."""
    database = StateDatabase.at(state)
    database.heartbeat()
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda worker: _report_many(state, worker), "abcdef"))
    found = QuotaTable(database).report("a", 6, nothing)
    assert found.documents == {"key": "30"}
    assert found.workers == tuple("abcdef")
    database.close()
