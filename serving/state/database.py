"""The state database, where supervisors say what they run and gateways read it. Blocking: see link.py.

One revision number counts the changes of replicas; it grows in the transaction that makes the change, so whoever has
read revision n knows every change up to n.
"""

import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Table, delete, func, insert, inspect, literal, select, update
from sqlalchemy.exc import SQLAlchemyError

from serving.errors import StateAway
from serving.replica import Replica, State
from serving.state.engine import StateEngine
from serving.state.tables import FOLLOWERS, METADATA, OWNERS, REPLICAS, SCHEMA_VERSION, STATE

FORGET_OWNER_SECONDS = 86400.0
FORGET_FOLLOWER_SECONDS = 3600.0
SINCE_TOLERANCE_SECONDS = 2.0  # it is reckoned from a monotonic clock each time
MIGRATION_LOCK = 7_165_203  # any number that nobody else uses for an advisory lock of PostgreSQL


@dataclass(frozen=True, slots=True)
class Owner:
    """A supervisor; `id` outlives its process, `beat` and `beat_at` tell when it last wrote."""

    id: str
    host: str
    pid: int
    joined_at: float = 0.0
    beat: int = 0
    beat_at: float = 0.0


@dataclass(frozen=True, slots=True)
class Told:
    """One replica, in the words of its owner; `since` is on the owner's wall clock."""

    replica: Replica
    state: State
    reason: str
    since: float
    pid: int | None = None
    revision: int = 0


@dataclass(frozen=True, slots=True)
class Seen:
    """A gateway worker: the revision that it acts on, and its beat."""

    id: str
    revision: int
    beat: int


@dataclass(frozen=True, slots=True)
class Published:
    """What an owner learns when it writes: where its replicas stand in the count, and who follows."""

    revision: int
    revisions: Mapping[str, int]
    followers: tuple[Seen, ...]


@dataclass(frozen=True, slots=True)
class Pulse:
    """The little that is read several times a second; `owners` holds beats and `beat_at`."""

    epoch: str
    revision: int
    owners: tuple[Owner, ...]


@dataclass(frozen=True, slots=True)
class Picture:
    """Everything there is, at one revision."""

    pulse: Pulse
    told: tuple[tuple[str, Told], ...]


EMPTY = Picture(Pulse("", 0, ()), ())


@dataclass(slots=True)
class StateDatabase:
    """Every question to the state database is one method and one transaction; StateAway if it can't be answered."""

    engine: StateEngine
    create: bool = True
    _prepared: bool = field(default=False, init=False)

    @classmethod
    def at(cls, url: str, *, create: bool = True) -> "StateDatabase":
        """Say where it is, without connecting; ConfigError if nobody could. `create`: make it on first use."""
        return cls(StateEngine.at(url), create)

    def close(self) -> None:
        """Give back the connections."""
        self.engine.close()

    def publish(self, owner: Owner, told: Sequence[Told], now: float) -> Published:
        """Beat, and make the database say of an owner's replicas exactly this."""
        with self._writing() as connection:
            _beat(connection, OWNERS, now, id=owner.id, host=owner.host, pid=owner.pid, joined_at=now)
            forgotten = _forget(connection, now)
            known = {each.replica.id: each for _, each in _told(connection, owner.id)}
            changed, gone = differences(known, told)
            if changed or gone or forgotten:
                _write(connection, owner.id, changed, gone, _next_revision(connection))
            revisions = {each.replica.id: each.revision for _, each in _told(connection, owner.id)}
            return Published(_pulse(connection).revision, revisions, _followers(connection))

    def withdraw(self, owner_id: str) -> None:
        """Forget an owner that leaves in order, and its replicas."""
        with self._writing() as connection:
            _next_revision(connection)
            _remove_owners(connection, [owner_id])

    def pulse(self) -> Pulse:
        """Tell whether anything has changed, and who is alive."""
        with self._reading() as connection:
            return _pulse(connection) if connection else EMPTY.pulse

    def picture(self) -> Picture:
        """Read everything, as of one revision."""
        with self._reading() as connection:
            return Picture(_pulse(connection), _told(connection)) if connection else EMPTY

    def acknowledge(self, follower_id: str, epoch: str, revision: int, now: float) -> None:
        """Say that a gateway worker acts on a revision; also its sign of life."""
        with self._writing() as connection:
            # A database that was made anew meanwhile counts differently.
            if _pulse(connection).epoch == epoch:
                _beat(connection, FOLLOWERS, now, id=follower_id, seen=revision)

    def leave(self, follower_id: str) -> None:
        """Forget a gateway worker that leaves in order."""
        with self._writing() as connection:
            connection.execute(delete(FOLLOWERS).where(FOLLOWERS.c.id == follower_id))

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        with self._translated():
            self._prepare()
            with self.engine.transaction(writing=True) as connection:
                yield connection

    @contextmanager
    def _reading(self) -> Iterator[Connection | None]:
        """A snapshot; None where there is nothing yet and nothing is to be made."""
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
        """Make the tables unless they are there; several processes may come at once."""
        if self.engine.replaced():
            self._prepared = False
        if self._prepared:
            return
        self.engine.set_up()
        with self.engine.transaction(writing=True) as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(select(func.pg_advisory_xact_lock(MIGRATION_LOCK)))
            METADATA.create_all(connection)
            version = connection.scalar(select(STATE.c.version))
            if version is None:
                first = {"id": 1, "version": SCHEMA_VERSION, "epoch": secrets.token_hex(8), "revision": 0}
                connection.execute(insert(STATE).values(first))
            elif version != SCHEMA_VERSION:
                raise StateAway(
                    f"state database {self.engine.name} has tables of version {version}, this quantgate knows "
                    f"{SCHEMA_VERSION}; run the same quantgate everywhere, or choose another database in gateway.state"
                )
        self._prepared = True

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (SQLAlchemyError, OSError) as error:
            # Whatever it was, the tables may be gone when it is back.
            self._prepared = False
            reason = str(getattr(error, "orig", None) or error).strip().partition("\n")[0]
            raise StateAway(f"state database {self.engine.name} is away: {reason}") from error


def differences(known: Mapping[str, Told], told: Sequence[Told]) -> tuple[list[Told], list[str]]:
    """What has to be written, and which replicas are gone, so that what is known becomes what is told."""
    changed = [each for each in told if not _same(known.get(each.replica.id), each)]
    return changed, sorted(known.keys() - {each.replica.id for each in told})


def _same(known: Told | None, told: Told) -> bool:
    if known is None or abs(known.since - told.since) > SINCE_TOLERANCE_SECONDS:
        return False
    # Keys are never stored.
    bare = replace(told.replica, api_key=None)
    return replace(known, since=told.since, revision=told.revision) == replace(told, replica=bare)


def _write(connection: Connection, owner_id: str, changed: list[Told], gone: list[str], revision: int) -> None:
    names = [*gone, *(each.replica.id for each in changed)]
    connection.execute(delete(REPLICAS).where(REPLICAS.c.owner == owner_id, REPLICAS.c.id.in_(names)))
    for each in changed:
        connection.execute(insert(REPLICAS).values(_row(owner_id, each, revision)))


def _row(owner_id: str, told: Told, revision: int) -> dict[str, Any]:
    replica = told.replica
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
        "state": told.state.value,
        "reason": told.reason,
        "since": told.since,
        "pid": told.pid,
        "revision": revision,
    }


_REPLICA_COLUMNS = (
    *("id", "variant", "precision", "url", "served_name", "max_model_len_tokens", "think", "think_token", "tools"),
)


def _told(connection: Connection, owner_id: str | None = None) -> tuple[tuple[str, Told], ...]:
    question = select(REPLICAS).order_by(REPLICAS.c.owner, REPLICAS.c.id)
    if owner_id is not None:
        question = question.where(REPLICAS.c.owner == owner_id)
    found = []
    for row in connection.execute(question).mappings():
        replica = Replica(**{name: row[name] for name in _REPLICA_COLUMNS})
        told = Told(replica, State(row["state"]), row["reason"], row["since"], row["pid"], row["revision"])
        found.append((row["owner"], told))
    return tuple(found)


def _pulse(connection: Connection) -> Pulse:
    row = connection.execute(select(STATE.c.epoch, STATE.c.revision)).one()
    owners = connection.execute(select(OWNERS).order_by(OWNERS.c.joined_at, OWNERS.c.id)).mappings()
    return Pulse(row.epoch, row.revision, tuple(Owner(**owner) for owner in owners))


def _followers(connection: Connection) -> tuple[Seen, ...]:
    rows = connection.execute(select(FOLLOWERS.c.id, FOLLOWERS.c.seen, FOLLOWERS.c.beat)).all()
    return tuple(Seen(row.id, row.seen, row.beat) for row in rows)


def _beat(connection: Connection, table: Table, now: float, **values: Any) -> None:
    """Count up the beat of whoever writes; the first time, enter it."""
    kept = {name: value for name, value in values.items() if name not in ("id", "joined_at")}
    mine = update(table).where(table.c.id == values["id"])
    done = connection.execute(mine.values(**kept, beat=table.c.beat + literal(1), beat_at=now))
    if done.rowcount == 0:
        connection.execute(insert(table).values(**values, beat=1, beat_at=now))


def _forget(connection: Connection, now: float) -> bool:
    """Throw away what died without a word long ago; tells whether replicas are gone with it."""
    connection.execute(delete(FOLLOWERS).where(FOLLOWERS.c.beat_at < now - FORGET_FOLLOWER_SECONDS))
    dead = connection.scalars(select(OWNERS.c.id).where(OWNERS.c.beat_at < now - FORGET_OWNER_SECONDS)).all()
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
    """Make a relative SQLite file count from the configuration's folder."""
    path = url.removeprefix("sqlite:///")
    if path == url or path.startswith(("/", ":")) or not path:
        return url
    return f"sqlite:///{folder.resolve() / path}"
