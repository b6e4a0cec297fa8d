"""The keys file as a key store: changes are locked against other processes and written atomically."""

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

from config.errors import ConfigError
from gateway.keys.stored import StoredKey, plain_key, read_stored


@dataclass(frozen=True, slots=True)
class KeyFile:
    """A keys file. A file that does not exist is created by the first key, readable by its owner only."""

    path: Path

    @property
    def name(self) -> str:
        """The path, for messages."""
        return str(self.path)

    def read(self) -> dict[str, StoredKey]:
        """Read all keys; ConfigError lists all problems of the file."""
        return read_stored(self.path)

    @contextmanager
    def edited(self, *, create: bool = False) -> Iterator[dict[str, StoredKey]]:
        """Lend the keys for a change, which is written when the block ends. `create`: the file may be missing."""
        if not create:
            self.read()  # a missing file is reported before a lock file is created beside it
        target = self.path.resolve()  # a symbolic link is kept
        try:
            with _locked(target):
                # An empty file is one that `touch` made: there is nothing to lose in it.
                stored = self.read() if self.path.exists() and self.path.stat().st_size else {}
                yield stored
                _write(target, stored)
        except OSError as error:
            raise ConfigError(f"{self.path}: can't be written: {error.strerror}") from error


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
    text = yaml.safe_dump({name: plain_key(key) for name, key in stored.items()}, sort_keys=False)
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
