"""Usage in the state database: hourly rows, to which gateway workers add. Calls block: see link.py."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sqlalchemy import ColumnElement, Connection, delete, func, insert, literal_column, select, update
from sqlalchemy.dialects import postgresql, sqlite

from serving.errors import TooMuchUsage
from serving.state.database import StateDatabase
from serving.state.tables import USAGE, USAGE_BATCHES

HOURS_PER_DAY = 24
HOUR_SECONDS = 3600
# Of one statement: a batch takes a few round trips, and fewer parameters than SQLite permits.
STATEMENT_ROWS = 500
# A batch is repeated within seconds of the database's return; after so long, its number is forgotten.
KEEP_BATCHES_SECONDS = 90 * 86400.0
MAX_ROWS = 50_000

Dimension = Literal["day", "hour", "key", "alias", "precision"]
COUNTS = ("requests", "errors", "prompt_tokens", "completion_tokens", "seconds", "external_cost_usd")


@dataclass(frozen=True, slots=True)
class Usage:
    """Sums over requests: `errors` are those without a complete answer, `seconds` last from arrival to last byte."""

    requests: int = 0
    errors: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    external_cost_usd: float = 0.0


@dataclass(frozen=True, slots=True)
class UsageRow:
    """What the requests of an hour, an API key, an alias and a precision used; `hour` counts hours since 1970."""

    hour: int
    key: str
    alias: str
    precision: str
    usage: Usage


@dataclass(frozen=True, slots=True)
class UsageGroup:
    """Usage grouped by some of the dimensions; those that it is not grouped by are None. `hour` is the first one."""

    usage: Usage
    hour: int | None = None
    key: str | None = None
    alias: str | None = None
    precision: str | None = None


@dataclass(frozen=True, slots=True)
class UsageDatabase:
    """Usage of a state database; StateAway if that is unavailable."""

    database: StateDatabase

    def add(self, worker: str, batch: int, rows: Sequence[UsageRow], now: float) -> None:
        """Add the rows of a worker's batch, unless that batch was added before. Batches of a worker count up from 1."""
        with self.database.writing() as connection:
            if not _is_new(connection, worker, batch, now):
                return
            # In one order, so that two workers do not wait for each other's rows.
            ordered = sorted(rows, key=lambda row: (row.hour, row.key, row.alias, row.precision))
            for first in range(0, len(ordered), STATEMENT_ROWS):
                _add(connection, ordered[first : first + STATEMENT_ROWS])

    def prune(self, keep_hours: int, now: float) -> None:
        """Remove rows that are older, and the numbers of batches that nothing repeats any more.

        `now` is the time of this machine; that of a database server is used instead, if there is one: a machine whose
        clock is wrong would remove the rows of all others.
        """
        with self.database.writing() as connection:
            if connection.dialect.name == "postgresql":
                now = float(connection.scalar(select(func.extract("epoch", func.now()))) or now)
            connection.execute(delete(USAGE).where(USAGE.c.hour < int(now) // HOUR_SECONDS - keep_hours))
            connection.execute(delete(USAGE_BATCHES).where(USAGE_BATCHES.c.at < now - KEEP_BATCHES_SECONDS))

    def grouped(
        self, by: Sequence[Dimension], since_hour: int, until_hour: int, max_rows: int = MAX_ROWS
    ) -> tuple[UsageGroup, ...]:
        """Add up the hours from `since_hour` to before `until_hour`; TooMuchUsage for more groups than `max_rows`."""
        names = ["hour" if name == "day" else name for name in by]
        columns = [_column(name).label(label) for name, label in zip(by, names, strict=True)]
        sums = [func.sum(USAGE.c[name]).label(name) for name in COUNTS]
        within = (USAGE.c.hour >= since_hour) & (USAGE.c.hour < until_hour)
        query = select(*columns, *sums).where(within).group_by(*columns).order_by(*columns)
        with self.database.reading() as connection:
            if connection is None:
                return ()
            # Without columns to group by, no rows have one group of nulls.
            found = connection.execute(query.having(func.count() > 0).limit(max_rows + 1)).mappings().all()
        if len(found) > max_rows:
            raise TooMuchUsage(f"more than {max_rows} rows; choose a shorter time, or group by fewer dimensions")
        return tuple(UsageGroup(_usage(row), **{name: row[name] for name in names}) for row in found)


def _column(name: Dimension) -> ColumnElement[Any]:
    # Not a parameter: PostgreSQL does not see that two expressions with parameters are the same.
    return USAGE.c.hour - USAGE.c.hour % literal_column(str(HOURS_PER_DAY)) if name == "day" else USAGE.c[name]


def _usage(row: Any) -> Usage:
    # PostgreSQL's sums of integers are decimals.
    whole = {name: int(row[name]) for name in COUNTS[:4]}
    return Usage(**whole, seconds=float(row["seconds"]), external_cost_usd=float(row["external_cost_usd"]))


def _is_new(connection: Connection, worker: str, batch: int, now: float) -> bool:
    """Whether a batch was not added yet; it counts as added from now on."""
    mine = USAGE_BATCHES.c.worker == worker
    before = connection.scalar(select(USAGE_BATCHES.c.batch).where(mine).with_for_update())
    if before is None:
        connection.execute(insert(USAGE_BATCHES).values(worker=worker, batch=batch, at=now))
    elif batch > before:
        connection.execute(update(USAGE_BATCHES).where(mine).values(batch=batch, at=now))
    return before is None or batch > before


def _add(connection: Connection, rows: Sequence[UsageRow]) -> None:
    make = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
    values = [
        {"hour": row.hour, "key": row.key, "alias": row.alias, "precision": row.precision, **asdict(row.usage)}
        for row in rows
    ]
    new = make(USAGE).values(values)
    added = {name: USAGE.c[name] + new.excluded[name] for name in COUNTS}
    connection.execute(new.on_conflict_do_update(index_elements=list(USAGE.primary_key), set_=added))
