"""Keys in the state database: a key store for the command line, and the keys in force for gateways."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec
from pydantic import ValidationError

from config.errors import ConfigError
from gateway.keys.authentication import Keys
from gateway.keys.stored import StoredKey, keys_in_force, plain_key, problems
from serving.state.database import StateDatabase
from serving.state.keys import KeyRecords, KeyTable


@dataclass(frozen=True, slots=True)
class KeyDatabase:
    """The keys of a state database; StateAway if that is unavailable. Calls block."""

    database: StateDatabase

    @property
    def name(self) -> str:
        """The address of the database without its password, for messages."""
        return self.database.engine.name

    def read(self) -> dict[str, StoredKey]:
        """Read all keys; ConfigError if one is invalid."""
        return read_documents(KeyTable(self.database).read().documents, self.name)

    @contextmanager
    def edited(self, *, create: bool = False) -> Iterator[dict[str, StoredKey]]:  # noqa: ARG002 - it always may
        """Lend the keys for a change, which is one transaction; missing tables are created."""
        with KeyTable(self.database).edited() as documents:
            stored = read_documents(documents, self.name)
            yield stored
            documents.clear()
            documents.update({name: _document(key) for name, key in stored.items()})


def read_documents(documents: Mapping[str, str], where: str) -> dict[str, StoredKey]:
    """Read keys from their documents in the database `where`; ConfigError lists all problems, without values."""
    stored, found = {}, []
    for name, document in documents.items():
        try:
            stored[name] = StoredKey.model_validate_json(document)
        except ValidationError as error:
            found += [f"{where}: key {name!r}: {problem}" for problem in problems(error, StoredKey)]
    if found:
        raise ConfigError("\n".join(found))
    return stored


def keys_of(records: KeyRecords, where: str) -> Keys:
    """Make the keys for authentication; ConfigError if one is invalid."""
    return keys_in_force(read_documents(records.documents, where))


def _document(key: StoredKey) -> str:
    return msgspec.json.encode(plain_key(key)).decode()
