"""API keys in the state database, as documents of gateway.keys. Calls block: see link.py."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from sqlalchemy import Connection, delete, insert, select, update

from serving.state.database import StateDatabase
from serving.state.tables import KEYS, STATE


@dataclass(frozen=True, slots=True)
class KeyRecords:
    """The document of each key by its name, at one revision; an empty epoch: the database has no tables."""

    epoch: str
    revision: int
    documents: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class KeyTable:
    """The keys of a state database; StateAway if that is unavailable."""

    database: StateDatabase

    def revision(self) -> tuple[str, int]:
        """The count of changes, with the epoch of the database; ("", 0) if it has no tables."""
        with self.database.reading() as connection:
            return _revision(connection) if connection else ("", 0)

    def read(self) -> KeyRecords:
        """Read all keys."""
        with self.database.reading() as connection:
            return KeyRecords(*_revision(connection), _documents(connection)) if connection else KeyRecords("", 0, {})

    @contextmanager
    def edited(self) -> Iterator[dict[str, str]]:
        """Lend the documents for a change, which is written when the block ends; others who change keys wait."""
        with self.database.writing() as connection:
            # Also the lock: another transaction that changes this row waits for the end of this one.
            connection.execute(update(STATE).values(key_revision=STATE.c.key_revision + 1))
            before = _documents(connection)
            after = dict(before)
            yield after
            changed = {name: document for name, document in after.items() if before.get(name) != document}
            gone = [name for name, document in before.items() if after.get(name) != document]
            for name in gone:
                connection.execute(delete(KEYS).where(KEYS.c.name == name))
            if changed:
                rows = [{"name": name, "document": document} for name, document in changed.items()]
                connection.execute(insert(KEYS), rows)


def _revision(connection: Connection) -> tuple[str, int]:
    row = connection.execute(select(STATE.c.epoch, STATE.c.key_revision)).one()
    return row.epoch, row.key_revision


def _documents(connection: Connection) -> dict[str, str]:
    rows = connection.execute(select(KEYS.c.name, KEYS.c.document).order_by(KEYS.c.name))
    return {row.name: row.document for row in rows}
