"""Changes of keys, in a file or in the state database: create, import, rotate and revoke. All raise ConfigError."""

import hashlib
import secrets
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Protocol

from pydantic import TypeAdapter, ValidationError

from config.errors import ConfigError
from config.rules import closest
from gateway.keys.stored import MAX_KEYS_PER_NAME, KeyLimits, KeyName, StoredKey, shared_digests

PREFIX = "qg-"
RANDOM_BYTES = 32
NO_LIMITS = KeyLimits()

_NAME = TypeAdapter(KeyName)


class KeyStore(Protocol):
    """Where keys are: a file, or the state database; `name` is for messages."""

    @property
    def name(self) -> str:
        """Where the keys are, for messages."""

    def read(self) -> dict[str, StoredKey]:
        """Read all keys."""

    def edited(self, *, create: bool = False) -> AbstractContextManager[dict[str, StoredKey]]:
        """Lend the keys for a change, which is written when the block ends without an error.

        `create`: the store may not exist yet.
        """


def create_key(store: KeyStore, name: str, limits: KeyLimits = NO_LIMITS) -> str:
    """Add a key and return it; only its digest is stored."""
    try:
        _NAME.validate_python(name)
    except ValidationError:
        raise ConfigError(
            f"{name!r} is not a valid key name; use at most 128 letters, digits and . _ @ : / + -"
        ) from None
    with store.edited(create=True) as stored:
        if name in stored:
            how = f"choose another name, or use `quantgate keys rotate {name}`"
            raise ConfigError(f"{store.name}: there is already a key named {name!r}; {how}")
        key, digest = _new_key()
        stored[name] = StoredKey.model_validate({**limits.model_dump(), "sha256": digest})
    return key


def import_keys(store: KeyStore, keys: Mapping[str, StoredKey]) -> None:
    """Add keys with their digests and limits; nothing is added if a name or a digest is there already."""
    with store.edited(create=True) as stored:
        if names := sorted(keys.keys() & stored.keys()):
            how = f"revoke it with `quantgate keys revoke {names[0]}`, or leave it out"
            raise ConfigError(f"{store.name}: there is already a key named {', '.join(map(repr, names))}; {how}")
        stored.update(keys)
        if shared := next(shared_digests(stored), None):
            raise ConfigError(f"{store.name}: {shared[0]} has the same key as {shared[1]}; create one key per name")


def rotate_key(store: KeyStore, name: str) -> str:
    """Add a second key with the same limits and return it; the first one stays in force until it is revoked."""
    with store.edited() as stored:
        entry = _entry(store, stored, name)
        if len(entry.sha256) == MAX_KEYS_PER_NAME:
            how = f"remove the older one with `quantgate keys revoke {name} --old`"
            raise ConfigError(f"{store.name}: {name!r} already has two keys; {how}")
        key, digest = _new_key()
        stored[name] = entry.model_copy(update={"sha256": (*entry.sha256, digest)})
    return key


def revoke_key(store: KeyStore, name: str) -> None:
    """Remove a name with its keys."""
    with store.edited() as stored:
        _entry(store, stored, name)
        del stored[name]


def revoke_old_key(store: KeyStore, name: str) -> None:
    """Remove the older one of a name's two keys."""
    with store.edited() as stored:
        entry = _entry(store, stored, name)
        if len(entry.sha256) < MAX_KEYS_PER_NAME:
            how = f"`quantgate keys rotate {name}` adds a second one, `quantgate keys revoke {name}` removes it"
            raise ConfigError(f"{store.name}: {name!r} has only one key; {how}")
        stored[name] = entry.model_copy(update={"sha256": entry.sha256[-1:]})


def _entry(store: KeyStore, stored: Mapping[str, StoredKey], name: str) -> StoredKey:
    if name not in stored:
        raise ConfigError(f"{store.name}: there is no key named {name!r}; {closest(name, stored)}")
    return stored[name]


def _new_key() -> tuple[str, str]:
    key = PREFIX + secrets.token_urlsafe(RANDOM_BYTES)
    return key, hashlib.sha256(key.encode()).hexdigest()
