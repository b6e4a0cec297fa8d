"""What gateway workers hold of the limits of API keys, in the state database. Calls block: see link.py.

The database gives the lock and the clock. How limits are shared is not known here: documents are JSON of
gateway.quota_shares.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from sqlalchemy import Connection, bindparam, delete, func, insert, select, update

from serving.state.database import StateDatabase
from serving.state.tables import QUOTA_WORKERS, QUOTAS

QUOTA_LOCK = 7_165_204  # an arbitrary key of a PostgreSQL advisory lock
# A worker is removed after so long without a report. It stops using what it holds earlier, by its own clock.
EXPIRE_SECONDS = 10.0
# Without a report of any worker for so long, the database was away: nobody is removed for that.
OUTAGE_SECONDS = 5.0
# The clock of the database was set back if the last report is so much later than now, as after a failover.
STEP_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class QuotaRecords:
    """The documents by key, and the workers that live; `now` is on the clock of the database.

    `repeated`: the report of the worker was added before, and its answer was lost. `known`: the worker was not removed
    since its report before. `step_seconds` (at most 0): times in the documents are of a clock that was set back since.
    `report_seconds`: for how long the report kept other workers waiting.
    """

    now: float
    workers: tuple[str, ...]
    documents: Mapping[str, str]
    repeated: bool = False
    known: bool = True
    step_seconds: float = 0.0
    report_seconds: float = 0.0


# Returns the documents to write; None removes one.
QuotaChange = Callable[[QuotaRecords], Mapping[str, str | None]]


@dataclass(frozen=True, slots=True)
class QuotaTable:
    """Shared limits of a state database; StateAway if that is unavailable."""

    database: StateDatabase

    def report(self, worker: str, batch: int, change: QuotaChange) -> QuotaRecords:
        """Change the documents by a worker's report, one worker at a time; reports of a worker count up from 1.

        Returns the records after the change.
        """
        with self.database.writing() as connection:
            now = _lock(connection)
            began = time.monotonic()
            found = _renew(connection, worker, batch, now)
            after = _write(connection, found.documents, change(found))
            return replace(found, documents=after, report_seconds=time.monotonic() - began)

    def leave(self, worker: str, batch: int, change: QuotaChange) -> None:
        """Add the last report of a worker, and remove it."""
        with self.database.writing() as connection:
            found = _renew(connection, worker, batch, _lock(connection))
            connection.execute(delete(QUOTA_WORKERS).where(QUOTA_WORKERS.c.worker == worker))
            found = replace(found, workers=_live(connection))
            _write(connection, found.documents, change(found))


def _lock(connection: Connection) -> float:
    """Wait until no other worker changes the documents; return the time. SQLite has one writer, on one machine."""
    if connection.dialect.name != "postgresql":
        return time.time()
    connection.execute(select(func.pg_advisory_xact_lock(QUOTA_LOCK)))
    return float(connection.scalar(select(func.extract("epoch", func.clock_timestamp()))) or 0.0)


def _renew(connection: Connection, worker: str, batch: int, now: float) -> QuotaRecords:
    """Prolong the life of a worker, and remove those that are dead; return the records that its report changes."""
    step_seconds = _allow_for_clock(connection, now)
    connection.execute(delete(QUOTA_WORKERS).where(QUOTA_WORKERS.c.expires_at < now))
    before = _count_report(connection, worker, batch, now)
    return QuotaRecords(
        now,
        _live(connection),
        _documents(connection),
        repeated=before is not None and batch <= before,
        known=before is not None,
        step_seconds=step_seconds,
    )


def _allow_for_clock(connection: Connection, now: float) -> float:
    """Move the lives of workers by an outage or a backward step of the clock; return the step, at most 0."""
    newest = connection.scalar(select(func.max(QUOTA_WORKERS.c.expires_at)))
    silence_seconds = now - (newest - EXPIRE_SECONDS) if newest is not None else 0.0
    if -STEP_SECONDS <= silence_seconds <= OUTAGE_SECONDS:
        return 0.0
    moved = {"expires_at": QUOTA_WORKERS.c.expires_at + silence_seconds}
    connection.execute(update(QUOTA_WORKERS).values(moved))
    return min(silence_seconds, 0.0)


def _count_report(connection: Connection, worker: str, batch: int, now: float) -> int | None:
    """Prolong the life of a worker; return the number of its report before, None if it is not known."""
    mine = QUOTA_WORKERS.c.worker == worker
    before = connection.scalar(select(QUOTA_WORKERS.c.batch).where(mine))
    values = {"batch": batch, "expires_at": now + EXPIRE_SECONDS}
    if before is None:
        connection.execute(insert(QUOTA_WORKERS).values(worker=worker, **values))
    else:
        connection.execute(update(QUOTA_WORKERS).where(mine).values(values))
    return before


def _live(connection: Connection) -> tuple[str, ...]:
    return tuple(connection.scalars(select(QUOTA_WORKERS.c.worker).order_by(QUOTA_WORKERS.c.worker)))


def _documents(connection: Connection) -> dict[str, str]:
    return {row.key: row.document for row in connection.execute(select(QUOTAS.c.key, QUOTAS.c.document))}


def _write(connection: Connection, before: Mapping[str, str], changes: Mapping[str, str | None]) -> dict[str, str]:
    """Write the documents that differ; return all of them."""
    after = {key: document for key, document in {**before, **changes}.items() if document is not None}
    for key in before.keys() - after.keys():
        connection.execute(delete(QUOTAS).where(QUOTAS.c.key == key))
    changed = [(key, document) for key, document in after.items() if before.get(key) != document]
    if new := [{"key": key, "document": document} for key, document in changed if key not in before]:
        connection.execute(insert(QUOTAS), new)
    if old := [{"name": key, "text": document} for key, document in changed if key in before]:
        row = update(QUOTAS).where(QUOTAS.c.key == bindparam("name"))
        connection.execute(row.values(document=bindparam("text")), old)
    return after
