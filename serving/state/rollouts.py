"""Rollouts in the state database: records, revisions of aliases, audit log, leases, evidence. Calls block: see link.py.

What a rollout is and does is not known here: plans, states and revisions are JSON of gateway.rollout. Each method is
one transaction, and a change of a rollout, its log entry and the alias' new revision are one change.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Connection, Table, delete, func, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite

from serving.errors import LeaseLost, RolloutChanged, RolloutExists
from serving.state.database import StateDatabase
from serving.state.rollout_records import (
    EMPTY,
    BlockRecord,
    Change,
    Demand,
    DrawRecord,
    LogEntry,
    RevisionRecord,
    RolloutRecord,
    RolloutSnapshot,
)
from serving.state.tables import (
    ALIAS_REVISIONS,
    REPLICA_DEMANDS,
    ROLLOUT_BLOCKS,
    ROLLOUT_DRAWS,
    ROLLOUT_EVENTS,
    ROLLOUT_LEASES,
    ROLLOUTS,
    STATE,
)

# A row may become visible after one with a higher number: readers look back so far, and know what they have seen.
SEQ_OVERLAP = 2000
MAX_DRAWS = 100_000


@dataclass(frozen=True, slots=True)
class RolloutDatabase:
    """Rollouts of a state database; StateAway if that is unavailable."""

    database: StateDatabase

    # What gateways and supervisors follow

    def revision(self) -> tuple[str, int]:
        """The count of changes, with the epoch of the database; ("", 0) if there is none."""
        with self.database.reading() as connection:
            return _revision(connection) if connection else ("", 0)

    def snapshot(self) -> RolloutSnapshot:
        """Read what gateways follow."""
        with self.database.reading() as connection:
            if connection is None:
                return EMPTY
            epoch, revision = _revision(connection)
            active = _rollouts(connection, ROLLOUTS.c.active)
            return RolloutSnapshot(epoch, revision, active, _latest(connection), _demands(connection))

    # Records

    def start(self, record: RolloutRecord, entry: LogEntry, revision: str | None = None) -> None:
        """Record a new rollout, with the first revision of its alias; RolloutExists if the alias has an active one."""
        with self.database.writing() as connection:
            _changed(connection)
            if (other := _active(connection, record.alias)) is not None:
                raise RolloutExists(_exists(other))
            connection.execute(insert(ROLLOUTS).values(**_values(record)))
            if revision is not None:
                new = RevisionRecord(record.alias, 0, revision, entry.why, entry.by, entry.at, record.id)
                _add_revision(connection, new)
            _log(connection, (entry,))

    def change(
        self,
        rollout_id: str,
        version: int,
        change: Change,
        by: str,
        now: float,
        fence: int | None,
        revision: int | None = None,
    ) -> None:
        """Write a change. RolloutChanged: another one was written before. LeaseLost: `fence` is not the lease's.

        A `fence` of None is an operator's, who needs no lease. A `revision` is that of the snapshot that the change is
        based on: what other rollouts use may have changed since then, too.
        """
        with self.database.writing() as connection:
            _changed(connection)
            if revision is not None and _revision(connection)[1] != revision + 1:
                raise RolloutChanged("another rollout has changed meanwhile; read them again")
            where = (ROLLOUTS.c.id == rollout_id) & (ROLLOUTS.c.version == version)
            row = (
                update(ROLLOUTS)
                .where(where)
                .values(state=change.state, phase=change.phase, active=change.active, version=version + 1)
            )
            if connection.execute(row).rowcount == 0:
                raise RolloutChanged(f"rollout {rollout_id} has changed meanwhile; read it again")
            alias = connection.scalar(select(ROLLOUTS.c.alias).where(ROLLOUTS.c.id == rollout_id))
            assert alias is not None
            if fence is not None:
                _check_fence(connection, alias, fence)
            if change.revision is not None:
                cause = change.entries[-1].why if change.entries else ""
                new = RevisionRecord(alias, 0, change.revision, cause, by, now, rollout_id)
                _add_revision(connection, new)
            _put_demands(connection, change.demands)
            _log(connection, change.entries)
            if not change.active:
                _forget(connection, rollout_id)

    def get(self, rollout_id: str) -> RolloutRecord | None:
        """One rollout."""
        with self.database.reading() as connection:
            found = _rollouts(connection, ROLLOUTS.c.id == rollout_id) if connection else ()
            return found[0] if found else None

    def latest(self, alias: str) -> RolloutRecord | None:
        """The active rollout of an alias, else the one that was started last."""
        with self.database.reading() as connection:
            found = _rollouts(connection, ROLLOUTS.c.alias == alias) if connection else ()
            return next((each for each in found if each.active), found[0] if found else None)

    # Revisions and log

    def revisions(self, alias: str, limit: int = 20) -> tuple[RevisionRecord, ...]:
        """The latest revisions of an alias, newest first."""
        with self.database.reading() as connection:
            if connection is None:
                return ()
            query = select(ALIAS_REVISIONS).where(ALIAS_REVISIONS.c.alias == alias)
            rows = connection.execute(query.order_by(ALIAS_REVISIONS.c.number.desc()).limit(limit)).mappings()
            return tuple(RevisionRecord(**row) for row in rows)

    def revise(self, record: RevisionRecord, entry: LogEntry, demands: tuple[Demand, ...] = ()) -> int:
        """Add a revision of an alias without a rollout, and return its number; RolloutExists if one is active."""
        with self.database.writing() as connection:
            _changed(connection)
            if (other := _active(connection, record.alias)) is not None:
                raise RolloutExists(_exists(other))
            number = _add_revision(connection, record)
            _put_demands(connection, demands)
            _log(connection, (entry,))
            return number

    def entries(self, alias: str, limit: int = 100, rollout: str | None = None) -> tuple[LogEntry, ...]:
        """The latest entries of the audit log, oldest first."""
        with self.database.reading() as connection:
            if connection is None:
                return ()
            query = select(ROLLOUT_EVENTS).where(ROLLOUT_EVENTS.c.alias == alias)
            if rollout is not None:
                query = query.where(ROLLOUT_EVENTS.c.rollout == rollout)
            rows = connection.execute(query.order_by(ROLLOUT_EVENTS.c.seq.desc()).limit(limit)).mappings()
            return tuple(_entry(row) for row in rows)[::-1]

    def events(self, events: Sequence[str]) -> tuple[LogEntry, ...]:
        """The entries of the audit log about some events, of all aliases, oldest first."""
        with self.database.reading() as connection:
            if connection is None:
                return ()
            query = select(ROLLOUT_EVENTS).where(ROLLOUT_EVENTS.c.event.in_(events)).order_by(ROLLOUT_EVENTS.c.seq)
            return tuple(map(_entry, connection.execute(query).mappings()))

    def log(self, entry: LogEntry) -> None:
        """Add an entry that changes nothing."""
        with self.database.writing() as connection:
            _log(connection, (entry,))

    def without_hooks(self, rollout_id: str) -> tuple[LogEntry, ...]:
        """The entries of a rollout whose hooks have not run, oldest first."""
        with self.database.reading() as connection:
            if connection is None:
                return ()
            where = (ROLLOUT_EVENTS.c.rollout == rollout_id) & ~ROLLOUT_EVENTS.c.hooked
            rows = connection.execute(select(ROLLOUT_EVENTS).where(where).order_by(ROLLOUT_EVENTS.c.seq)).mappings()
            return tuple(map(_entry, rows))

    def hooked(self, seq: int) -> None:
        """Record that the hooks of an entry have run."""
        with self.database.writing() as connection:
            connection.execute(update(ROLLOUT_EVENTS).where(ROLLOUT_EVENTS.c.seq == seq).values(hooked=True))

    # Leases

    def lease(self, alias: str, holder: str, now: float, seconds: float) -> int | None:
        """Take or renew the lease of an alias, and return its fencing number; None if another process holds it."""
        with self.database.writing() as connection:
            query = select(ROLLOUT_LEASES).where(ROLLOUT_LEASES.c.alias == alias).with_for_update()
            row = connection.execute(query).one_or_none()
            if row is None:
                values = {"alias": alias, "holder": holder, "fence": 1, "expires_at": now + seconds}
                return 1 if _insert_missing(connection, ROLLOUT_LEASES, [values]) else None
            if row.holder != holder and row.expires_at > now:
                return None
            fence: int = row.fence + (row.holder != holder)
            changed = update(ROLLOUT_LEASES).where(ROLLOUT_LEASES.c.alias == alias)
            connection.execute(changed.values(holder=holder, fence=fence, expires_at=now + seconds))
            return fence

    def release(self, alias: str, holder: str) -> None:
        """Give a lease back, so that another process need not wait until it expires."""
        with self.database.writing() as connection:
            mine = (ROLLOUT_LEASES.c.alias == alias) & (ROLLOUT_LEASES.c.holder == holder)
            connection.execute(update(ROLLOUT_LEASES).where(mine).values(expires_at=0.0))

    def lease_holder(self, alias: str, now: float) -> str | None:
        """Who drives the rollout of an alias; None if nothing does."""
        with self.database.reading() as connection:
            if connection is None:
                return None
            where = (ROLLOUT_LEASES.c.alias == alias) & (ROLLOUT_LEASES.c.expires_at > now)
            return connection.scalar(select(ROLLOUT_LEASES.c.holder).where(where))

    # Evidence and draws

    def add_evidence(self, rollout_id: str, blocks: Sequence[BlockRecord], draws: Sequence[DrawRecord]) -> None:
        """Add what a worker saw; a block or draw that is there already stays as it is."""
        with self.database.writing() as connection:
            active = connection.scalar(select(ROLLOUTS.c.active).where(ROLLOUTS.c.id == rollout_id))
            if not active:
                return
            _insert_missing(connection, ROLLOUT_BLOCKS, [_values(block) for block in blocks])
            _insert_missing(connection, ROLLOUT_DRAWS, [{"rollout": rollout_id, **_values(draw)} for draw in draws])

    def blocks(self, rollout_id: str, since: float = 0.0) -> tuple[BlockRecord, ...]:
        """The blocks of a rollout that ended at a time or later, in the order of time."""
        with self.database.reading() as connection:
            if connection is None:
                return ()
            where = (ROLLOUT_BLOCKS.c.rollout == rollout_id) & (ROLLOUT_BLOCKS.c.at >= since)
            order = (ROLLOUT_BLOCKS.c.block, ROLLOUT_BLOCKS.c.worker)
            rows = connection.execute(select(ROLLOUT_BLOCKS).where(where).order_by(*order))
            return tuple(BlockRecord(row.rollout, row.worker, row.block, row.at, row.document) for row in rows)

    def draws(self, rollout_id: str, after: int = 0) -> tuple[int, tuple[DrawRecord, ...]]:
        """The highest number of a draw, and draws above `after` less SEQ_OVERLAP, at most MAX_DRAWS; none if equal."""
        with self.database.reading() as connection:
            if connection is None:
                return after, ()
            mine = ROLLOUT_DRAWS.c.rollout == rollout_id
            if (connection.scalar(select(func.max(ROLLOUT_DRAWS.c.seq)).where(mine)) or 0) == after:
                return after, ()
            where = mine & (ROLLOUT_DRAWS.c.seq > after - SEQ_OVERLAP)
            query = select(ROLLOUT_DRAWS).where(where).order_by(ROLLOUT_DRAWS.c.seq.desc()).limit(MAX_DRAWS)
            rows = connection.execute(query).all()
            highest = max([after, *(row.seq for row in rows)])
            return highest, tuple(DrawRecord(row.conversation, row.arm, row.step) for row in reversed(rows))


def _revision(connection: Connection) -> tuple[str, int]:
    row = connection.execute(select(STATE.c.epoch, STATE.c.rollout_revision)).one()
    return row.epoch, row.rollout_revision


def _changed(connection: Connection) -> None:
    """Count a change; comes first in a transaction, because it makes writers of PostgreSQL wait for each other."""
    connection.execute(update(STATE).values(rollout_revision=STATE.c.rollout_revision + 1))


def _rollouts(connection: Connection, where: Any) -> tuple[RolloutRecord, ...]:
    rows = connection.execute(select(ROLLOUTS).where(where).order_by(ROLLOUTS.c.started_at.desc())).mappings()
    return tuple(RolloutRecord(**row) for row in rows)


def _active(connection: Connection, alias: str) -> RolloutRecord | None:
    found = _rollouts(connection, (ROLLOUTS.c.alias == alias) & ROLLOUTS.c.active)
    return found[0] if found else None


def _exists(other: RolloutRecord) -> str:
    return f"{other.started_by} already runs rollout {other.id} of {other.alias} (phase {other.phase})"


def _latest(connection: Connection) -> tuple[RevisionRecord, ...]:
    newest = select(ALIAS_REVISIONS.c.alias, func.max(ALIAS_REVISIONS.c.number).label("number"))
    newest_by_alias = newest.group_by(ALIAS_REVISIONS.c.alias).subquery()
    same = (ALIAS_REVISIONS.c.alias == newest_by_alias.c.alias) & (ALIAS_REVISIONS.c.number == newest_by_alias.c.number)
    rows = connection.execute(select(ALIAS_REVISIONS).join(newest_by_alias, same)).mappings()
    return tuple(RevisionRecord(**row) for row in rows)


def _add_revision(connection: Connection, record: RevisionRecord) -> int:
    highest = select(func.max(ALIAS_REVISIONS.c.number)).where(ALIAS_REVISIONS.c.alias == record.alias)
    number = (connection.scalar(highest) or 0) + 1
    connection.execute(insert(ALIAS_REVISIONS).values(**_values(replace(record, number=number))))
    return number


def _demands(connection: Connection) -> tuple[Demand, ...]:
    rows = connection.execute(select(REPLICA_DEMANDS).order_by(REPLICA_DEMANDS.c.variant)).mappings()
    return tuple(Demand(**row) for row in rows)


def _put_demands(connection: Connection, demands: Iterable[Demand]) -> None:
    for demand in demands:
        models = {each.variant: each.modeled_on for each in _demands(connection)}
        put = replace(demand, modeled_on=_model(demand, models))
        connection.execute(delete(REPLICA_DEMANDS).where(REPLICA_DEMANDS.c.variant == demand.variant))
        connection.execute(insert(REPLICA_DEMANDS).values(**_values(put)))


def _model(demand: Demand, models: Mapping[str, str]) -> str:
    """What a variant is launched like: as demanded, unless that one is launched like this very variant."""
    before, seen = demand.modeled_on, {demand.variant}
    while before not in seen and before in models:
        seen.add(before)
        before = models[before]
    return models.get(demand.variant, demand.modeled_on) if before == demand.variant else demand.modeled_on


def _log(connection: Connection, entries: Iterable[LogEntry]) -> None:
    for entry in entries:
        values = {name: value for name, value in _values(entry).items() if name != "seq"}
        connection.execute(insert(ROLLOUT_EVENTS).values(**values, hooked=entry.rollout is None))


def _entry(row: Mapping[Any, Any]) -> LogEntry:
    return LogEntry(**{name: value for name, value in row.items() if name != "hooked"})


def _check_fence(connection: Connection, alias: str, fence: int) -> None:
    query = select(ROLLOUT_LEASES.c.fence).where(ROLLOUT_LEASES.c.alias == alias).with_for_update()
    if connection.scalar(query) != fence:
        raise LeaseLost(f"another process drives the rollout of {alias} now")


def _forget(connection: Connection, rollout_id: str) -> None:
    """Remove the draws of a rollout that has ended; its evidence stays for the record."""
    connection.execute(delete(ROLLOUT_DRAWS).where(ROLLOUT_DRAWS.c.rollout == rollout_id))


def _insert_missing(connection: Connection, table: Table, rows: Sequence[Mapping[str, Any]]) -> int:
    """Insert the rows that are not there yet, by any unique index, and return their number."""
    make = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
    statement = make(table).on_conflict_do_nothing()
    return sum(connection.execute(statement, row).rowcount for row in rows)


def _values(record: Any) -> dict[str, Any]:
    return {name: getattr(record, name) for name in record.__dataclass_fields__}
