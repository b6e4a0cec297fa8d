"""Changes to a keys file: create, rotate and revoke keys. All raise ConfigError."""

import fcntl
import hashlib
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from pydantic import TypeAdapter, ValidationError

from config.errors import ConfigError
from config.rules import closest
from gateway.keys.stored import MAX_KEYS_PER_NAME, KeyLimits, KeyName, StoredKey, read_stored

PREFIX = "qg-"
RANDOM_BYTES = 32
NO_LIMITS = KeyLimits()

_NAME = TypeAdapter(KeyName)


def create_key(path: Path, name: str, limits: KeyLimits = NO_LIMITS) -> str:
    """Add a key to the file and return it; only its digest is stored.

    A missing file is created, readable by its owner only.
    """
    try:
        _NAME.validate_python(name)
    except ValidationError:
        raise ConfigError(
            f"{name!r} is not a valid key name; use at most 128 letters, digits and . _ @ : / + -"
        ) from None
    with _edited(path) as stored:
        if name in stored:
            how = f"choose another name, or use `quantgate keys rotate {name}`"
            raise ConfigError(f"{path}: there is already a key named {name!r}; {how}")
        key, digest = _new_key()
        stored[name] = StoredKey.model_validate({**limits.model_dump(), "sha256": digest})
    return key


def rotate_key(path: Path, name: str) -> str:
    """Add a second key with the same limits and return it; the first one stays in force until it is revoked."""
    read_stored(path)  # a missing file is reported before a lock file is created beside it
    with _edited(path) as stored:
        entry = _entry(path, stored, name)
        if len(entry.sha256) == MAX_KEYS_PER_NAME:
            how = f"remove the older one with `quantgate keys revoke {name} --old`"
            raise ConfigError(f"{path}: {name!r} already has two keys; {how}")
        key, digest = _new_key()
        stored[name] = entry.model_copy(update={"sha256": (*entry.sha256, digest)})
    return key


def revoke_key(path: Path, name: str) -> None:
    """Remove a name with its keys."""
    read_stored(path)
    with _edited(path) as stored:
        _entry(path, stored, name)
        del stored[name]


def revoke_old_key(path: Path, name: str) -> None:
    """Remove the older one of a name's two keys."""
    read_stored(path)
    with _edited(path) as stored:
        entry = _entry(path, stored, name)
        if len(entry.sha256) < MAX_KEYS_PER_NAME:
            how = f"`quantgate keys rotate {name}` adds a second one, `quantgate keys revoke {name}` removes it"
            raise ConfigError(f"{path}: {name!r} has only one key; {how}")
        stored[name] = entry.model_copy(update={"sha256": entry.sha256[-1:]})


def _entry(path: Path, stored: dict[str, StoredKey], name: str) -> StoredKey:
    if name not in stored:
        raise ConfigError(f"{path}: there is no key named {name!r}; {closest(name, stored)}")
    return stored[name]


def _new_key() -> tuple[str, str]:
    key = PREFIX + secrets.token_urlsafe(RANDOM_BYTES)
    return key, hashlib.sha256(key.encode()).hexdigest()


@contextmanager
def _edited(path: Path) -> Iterator[dict[str, StoredKey]]:
    """Lend the contents of a keys file for a change: locked against other processes, and written atomically."""
    target = path.resolve()  # a symbolic link is kept
    try:
        with _locked(target):
            # An empty file is one that `touch` made: there is nothing to lose in it.
            stored = read_stored(path) if path.exists() and path.stat().st_size else {}
            yield stored
            _write(target, stored)
    except OSError as error:
        raise ConfigError(f"{path}: can't be written: {error.strerror}") from error


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive flock(2) while the block runs; the kernel releases it when the process ends.

    The lock file is separate because the keys file is replaced, and is not removed because others may wait for it.
    """
    descriptor = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _write(path: Path, stored: dict[str, StoredKey]) -> None:
    """Replace a keys file atomically: a truncated one would lock its callers out."""
    text = yaml.safe_dump({name: _plain(key) for name, key in stored.items()}, sort_keys=False)
    descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mkstemp: mode 600
    try:
        with open(descriptor, "w", encoding="utf-8") as file:  # noqa: PTH123 - a descriptor, no path
            if path.exists() and (owner := path.stat()).st_uid != os.geteuid():
                os.fchown(descriptor, owner.st_uid, owner.st_gid)  # so the gateway can still read what root has written
            file.write(text)
            file.flush()
            os.fsync(descriptor)
        Path(draft).replace(path)
    except BaseException:
        Path(draft).unlink(missing_ok=True)
        raise


def _plain(key: StoredKey) -> dict[str, object]:
    fields = key.model_dump(mode="json", exclude_defaults=True)
    digests = fields.pop("sha256")
    return {"sha256": digests if len(digests) > 1 else digests[0], **fields}
