"""The state database: supervisors publish their replicas, gateways read them. Calls block: see link.py.

A revision number counts the changes of replicas. It grows in the transaction of the change, so a reader of revision n
has seen every change up to n.
"""

import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sqlalchemy import (
    Column,
    Connection,
    MetaData,
    String,
    Table,
    delete,
    func,
    insert,
    inspect,
    literal,
    select,
    update,
)
from sqlalchemy.exc import SQLAlchemyError

from serving.errors import StateAway
from serving.replica import Replica, State
from serving.state.engine import StateEngine
from serving.state.tables import FOLLOWERS, METADATA, OWNERS, REPLICAS, SCHEMA_VERSION, STATE, VERSION_TABLE

EXPIRE_OWNER_SECONDS = 86400.0
EXPIRE_FOLLOWER_SECONDS = 3600.0
SINCE_TOLERANCE_SECONDS = 2.0  # computed from a monotonic clock at each publish
UPGRADABLE = frozenset({2, 3, 4})  # older schema versions that migrations bring up to date
MIGRATION_LOCK = 7_165_203  # an arbitrary key of a PostgreSQL advisory lock


@dataclass(frozen=True, slots=True)
class Owner:
    """A supervisor; `id` outlives its process. `beat` counts its writes, `beat_at` is the time of the last."""

    id: str
    host: str
    pid: int
    joined_at: float = 0.0
    beat: int = 0
    beat_at: float = 0.0


@dataclass(frozen=True, slots=True)
class ReplicaRecord:
    """A replica as its owner published it; `since` is on the owner's wall clock."""

    replica: Replica
    state: State
    reason: str
    since: float
    pid: int | None = None
    revision: int = 0


@dataclass(frozen=True, slots=True)
class FollowerAck:
    """A gateway worker: the revision that it acts on, and the count of its writes."""

    id: str
    revision: int
    beat: int


@dataclass(frozen=True, slots=True)
class PublishReceipt:
    """Result of a publish: the revision of the database, those of the owner's replicas by id, and all followers."""

    revision: int
    revisions: Mapping[str, int]
    followers: tuple[FollowerAck, ...]


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """What is polled several times a second: the revision and the supervisors with their last writes."""

    epoch: str
    revision: int
    owners: tuple[Owner, ...]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All records, with the ids of their owners, at one revision."""

    heartbeat: Heartbeat
    records: tuple[tuple[str, ReplicaRecord], ...]


EMPTY = Snapshot(Heartbeat("", 0, ()), ())


@dataclass(slots=True)
class StateDatabase:
    """Queries and updates, each one transaction; StateAway if the database is unavailable."""

    engine: StateEngine
    create: bool = True
    _prepared: bool = field(default=False, init=False)
    _used: bool = field(default=False, init=False)  # with a schema that this version knows

    @classmethod
    def at(cls, url: str, *, create: bool = True) -> "StateDatabase":
        """Configure without connecting; ConfigError for an invalid URL. `create`: the first use creates the tables."""
        return cls(StateEngine.at(url), create)

    def close(self) -> None:
        """Close the connections."""
        self.engine.close()

    def publish(self, owner: Owner, records: Sequence[ReplicaRecord], now: float) -> PublishReceipt:
        """Write a heartbeat of the owner, and replace the records of its replicas."""
        with self.writing() as connection:
            _beat(connection, OWNERS, now, id=owner.id, host=owner.host, pid=owner.pid, joined_at=now)
            expired = _remove_expired(connection, now)
            known = {record.replica.id: record for _, record in _records(connection, owner.id)}
            changed, gone = differences(known, records)
            if changed or gone or expired:
                _write(connection, owner.id, changed, gone, _next_revision(connection))
            revisions = {record.replica.id: record.revision for _, record in _records(connection, owner.id)}
            return PublishReceipt(_heartbeat(connection).revision, revisions, _followers(connection))

    def withdraw(self, owner_id: str) -> None:
        """Remove an owner that shuts down, and its replicas."""
        with self.writing() as connection:
            _next_revision(connection)
            _remove_owners(connection, [owner_id])

    def heartbeat(self) -> Heartbeat:
        """Read the revision and the heartbeats of supervisors."""
        with self.reading() as connection:
            return _heartbeat(connection) if connection else EMPTY.heartbeat

    def snapshot(self) -> Snapshot:
        """Read all records at one revision."""
        with self.reading() as connection:
            return Snapshot(_heartbeat(connection), _records(connection)) if connection else EMPTY

    def acknowledge(self, follower_id: str, epoch: str, revision: int, now: float) -> None:
        """Record that a gateway worker acts on a revision; also its heartbeat."""
        with self.writing() as connection:
            # A database that was recreated in between counts from 0 again.
            if _heartbeat(connection).epoch == epoch:
                _beat(connection, FOLLOWERS, now, id=follower_id, seen=revision)

    def leave(self, follower_id: str) -> None:
        """Remove a gateway worker that shuts down."""
        with self.writing() as connection:
            connection.execute(delete(FOLLOWERS).where(FOLLOWERS.c.id == follower_id))

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction that excludes other writers (SQLite) or locks what it changes; creates missing tables."""
        with self._translated():
            self._prepare()
            with self.engine.transaction(writing=True) as connection:
                yield connection

    @contextmanager
    def reading(self) -> Iterator[Connection | None]:
        """A read transaction; None if the tables do not exist and must not be created."""
        with self._translated():
            if not self.create and not self._exists():
                yield None
                return
            self._prepare()
            with self.engine.transaction(writing=False) as connection:
                yield connection

    def _exists(self) -> bool:
        if self.engine.file is not None and not self.engine.file.exists():
            return False
        with self.engine.transaction(writing=False) as connection:
            return inspect(connection).has_table(STATE.name)

    def _prepare(self) -> None:
        """Create missing tables; several processes may do so at once."""
        if self.engine.replaced():
            self._prepared = False
        if self._prepared:
            return
        self.engine.set_up()
        with self.engine.transaction(writing=False) as connection:
            current = _version(connection) == SCHEMA_VERSION
        if not current:
            self._upgrade()
        self._prepared = self._used = True

    def _upgrade(self) -> None:
        """Create the tables in an empty database, or migrate an older one."""
        with self.engine.transaction(writing=True) as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(select(func.pg_advisory_xact_lock(MIGRATION_LOCK)))
            version = _version(connection)
            if version is None:
                _create(connection)
            elif version in UPGRADABLE:
                # Alembic takes 12 MiB and as long to import as the rest of a short command: only this needs it.
                from serving.state.migrations import migrate  # noqa: PLC0415

                migrate(connection, version)
            elif version != SCHEMA_VERSION and not (self._used and version == SCHEMA_VERSION + 1):
                # Migrations only add: a process that runs goes on while the next version is rolled out.
                raise StateAway(
                    f"state database {self.engine.name} has schema version {version}, this quantgate needs "
                    f"{SCHEMA_VERSION}; run the same quantgate everywhere, or choose another database in gateway.state"
                )

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (SQLAlchemyError, OSError) as error:
            # The tables may be gone when the database is available again.
            self._prepared = False
            reason = str(getattr(error, "orig", None) or error).strip().partition("\n")[0]
            raise StateAway(f"state database {self.engine.name} is unavailable: {reason}") from error


def _version(connection: Connection) -> int | None:
    """The schema version of a database; None if it has no tables of ours."""
    if not inspect(connection).has_table(STATE.name):
        return None
    return connection.scalar(select(STATE.c.version))


def _create(connection: Connection) -> None:
    """Create the tables as they are now, with the mark that Alembic leaves: a later migration starts from there."""
    METADATA.create_all(connection)
    schema = Table(VERSION_TABLE, MetaData(), Column("version_num", String(32), primary_key=True))
    schema.create(connection)
    connection.execute(insert(schema).values(version_num=str(SCHEMA_VERSION)))
    first = {"id": 1, "version": SCHEMA_VERSION, "epoch": secrets.token_hex(8), "revision": 0}
    connection.execute(insert(STATE).values(first))


def differences(
    known: Mapping[str, ReplicaRecord], records: Sequence[ReplicaRecord]
) -> tuple[list[ReplicaRecord], list[str]]:
    """Return the records to write and the ids to remove, to get from the known records to the new ones."""
    changed = [record for record in records if not _is_same(known.get(record.replica.id), record)]
    return changed, sorted(known.keys() - {record.replica.id for record in records})


def _is_same(known: ReplicaRecord | None, record: ReplicaRecord) -> bool:
    if known is None or abs(known.since - record.since) > SINCE_TOLERANCE_SECONDS:
        return False
    # Keys are never stored.
    bare = replace(record.replica, api_key=None)
    return replace(known, since=record.since, revision=record.revision) == replace(record, replica=bare)


def _write(connection: Connection, owner_id: str, changed: list[ReplicaRecord], gone: list[str], revision: int) -> None:
    names = [*gone, *(record.replica.id for record in changed)]
    connection.execute(delete(REPLICAS).where(REPLICAS.c.owner == owner_id, REPLICAS.c.id.in_(names)))
    for record in changed:
        connection.execute(insert(REPLICAS).values(_row(owner_id, record, revision)))


def _row(owner_id: str, record: ReplicaRecord, revision: int) -> dict[str, Any]:
    replica = record.replica
    return {
        "owner": owner_id,
        "id": replica.id,
        "variant": replica.variant,
        "precision": replica.precision,
        "url": replica.url,
        "served_name": replica.served_name,
        "max_model_len_tokens": replica.max_model_len_tokens,
        "think": replica.think,
        "think_token": replica.think_token,
        "tools": replica.tools,
        "adapters": ",".join(replica.adapters),
        "state": record.state.value,
        "reason": record.reason,
        "since": record.since,
        "pid": record.pid,
        "revision": revision,
    }


_REPLICA_COLUMNS = (
    *("id", "variant", "precision", "url", "served_name", "max_model_len_tokens", "think", "think_token", "tools"),
)


def _records(connection: Connection, owner_id: str | None = None) -> tuple[tuple[str, ReplicaRecord], ...]:
    query = select(REPLICAS).order_by(REPLICAS.c.owner, REPLICAS.c.id)
    if owner_id is not None:
        query = query.where(REPLICAS.c.owner == owner_id)
    records = []
    for row in connection.execute(query).mappings():
        adapters = tuple(filter(None, row["adapters"].split(",")))
        replica = Replica(**{name: row[name] for name in _REPLICA_COLUMNS}, adapters=adapters)
        record = ReplicaRecord(replica, State(row["state"]), row["reason"], row["since"], row["pid"], row["revision"])
        records.append((row["owner"], record))
    return tuple(records)


def _heartbeat(connection: Connection) -> Heartbeat:
    row = connection.execute(select(STATE.c.epoch, STATE.c.revision)).one()
    owners = connection.execute(select(OWNERS).order_by(OWNERS.c.joined_at, OWNERS.c.id)).mappings()
    return Heartbeat(row.epoch, row.revision, tuple(Owner(**owner) for owner in owners))


def _followers(connection: Connection) -> tuple[FollowerAck, ...]:
    rows = connection.execute(select(FOLLOWERS.c.id, FOLLOWERS.c.seen, FOLLOWERS.c.beat)).all()
    return tuple(FollowerAck(row.id, row.seen, row.beat) for row in rows)


def _beat(connection: Connection, table: Table, now: float, **values: Any) -> None:
    """Increment the heartbeat of a row, or insert it."""
    changing = {name: value for name, value in values.items() if name not in ("id", "joined_at")}
    row = update(table).where(table.c.id == values["id"])
    result = connection.execute(row.values(**changing, beat=table.c.beat + literal(1), beat_at=now))
    if result.rowcount == 0:
        connection.execute(insert(table).values(**values, beat=1, beat_at=now))


def _remove_expired(connection: Connection, now: float) -> bool:
    """Remove supervisors and followers without a heartbeat for long; return whether replicas were removed."""
    connection.execute(delete(FOLLOWERS).where(FOLLOWERS.c.beat_at < now - EXPIRE_FOLLOWER_SECONDS))
    dead = connection.scalars(select(OWNERS.c.id).where(OWNERS.c.beat_at < now - EXPIRE_OWNER_SECONDS)).all()
    if dead:
        _remove_owners(connection, list(dead))
    return bool(dead)


def _remove_owners(connection: Connection, owner_ids: list[str]) -> None:
    connection.execute(delete(REPLICAS).where(REPLICAS.c.owner.in_(owner_ids)))
    connection.execute(delete(OWNERS).where(OWNERS.c.id.in_(owner_ids)))


def _next_revision(connection: Connection) -> int:
    connection.execute(update(STATE).values(revision=STATE.c.revision + 1))
    revision = connection.scalar(select(STATE.c.revision))
    assert revision is not None
    return int(revision)


def state_url(url: str, folder: Path) -> str:
    """Resolve a relative SQLite file against the folder of the configuration."""
    path = url.removeprefix("sqlite:///")
    if path == url or path.startswith(("/", ":")) or not path:
        return url
    return f"sqlite:///{folder.resolve() / path}"
