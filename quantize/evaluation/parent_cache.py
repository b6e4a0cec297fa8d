"""What a parent said to given tokens, kept on disk between the evaluations of its variants.

An entry is a directory, named by a digest of everything that decides its contents: `entry.json` and, where there are
last hidden states, `states.bin`: a tensor [tokens, width] in the model's own precision. It appears whole or not at
all; one that doesn't match its checksum counts as missing. Old entries make room for new ones.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config.manifest import sha256_of

# Raise this when entries of old would be read wrongly.
_FORMAT = 1
_ENTRY, _STATES, _PARTIAL = "entry.json", "states.bin", ".partial"
DEFAULT_LIMIT_BYTES = 20_000_000_000


@dataclass(frozen=True, slots=True)
class ParentCacheEntry:
    """A finished entry: its facts, and where its states lie."""

    directory: Path
    facts: dict[str, Any]

    @property
    def states(self) -> Path:
        """The file of hidden states, if the entry has any."""
        return self.directory / _STATES


@dataclass(frozen=True, slots=True)
class ParentCache:
    """A directory of entries that never grows beyond `limit_bytes`."""

    root: Path
    limit_bytes: int = DEFAULT_LIMIT_BYTES

    def find(self, key: str) -> ParentCacheEntry | None:
        """Look an entry up and check it; a damaged one is removed."""
        directory = self.root / key
        try:
            payload = json.loads((directory / _ENTRY).read_bytes())
            facts, seal = payload["facts"], payload["sha256"]
            states = directory / _STATES
            whole = seal == _seal(facts, sha256_of(states) if states.is_file() else "")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            shutil.rmtree(directory, ignore_errors=True)
            return None
        os.utime(directory)
        return ParentCacheEntry(directory, facts)

    def keep(self, key: str, staged: Path, facts: dict[str, Any]) -> ParentCacheEntry:
        """Complete a staged directory and put it under its name; older entries make room."""
        states = staged / _STATES
        seal = _seal(facts, sha256_of(states) if states.is_file() else "")
        (staged / _ENTRY).write_text(json.dumps({"facts": facts, "sha256": seal}))
        try:
            staged.rename(self.root / key)
        except OSError:  # somebody else wrote the same entry meanwhile
            shutil.rmtree(self.root / key, ignore_errors=True)
            staged.rename(self.root / key)
        self._make_room(key)
        return ParentCacheEntry(self.root / key, facts)

    @contextmanager
    def staging(self, key: str) -> Iterator[Path]:
        """Lend a directory to write an entry in; what `keep` didn't take is removed."""
        staged = self.root / f".{key}.{os.getpid()}{_PARTIAL}"
        staged.mkdir(parents=True)
        try:
            yield staged
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    def _make_room(self, newest: str) -> None:
        sizes = [(path, _size_bytes(path)) for path in self._entries()]
        excess = sum(size for _, size in sizes) - self.limit_bytes
        for path, size in sizes:
            if excess <= 0:
                return
            if path.name != newest:
                shutil.rmtree(path, ignore_errors=True)
                excess -= size

    def _entries(self) -> list[Path]:
        """All entries, longest unused first; also what a process that is gone left staged."""
        found = [path for path in self.root.iterdir() if path.is_dir() and not _in_the_making(path)]
        return sorted(found, key=lambda path: (path.stat().st_mtime_ns, path.name))


def states_file(staged: Path) -> Path:
    """Where the states of a staged entry belong."""
    return staged / _STATES


def entry_key(kind: str, **deciding: Any) -> str:
    """Name an entry by everything that decides what is in it."""
    payload = json.dumps([_FORMAT, kind, deciding], sort_keys=True)
    return f"{kind}-{hashlib.sha256(payload.encode()).hexdigest()[:32]}"


def roomiest(wanted: Path, scratch: Path, needed_bytes: int) -> Path:
    """Choose where to write: the wanted directory, or scratch where that one is closed or full."""
    try:
        wanted.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(wanted).free if os.access(wanted, os.W_OK) else 0
    except OSError:
        free = 0
    if free > needed_bytes:
        return wanted
    scratch.mkdir(parents=True, exist_ok=True)
    return scratch


def _seal(facts: dict[str, Any], states_sha256: str) -> str:
    return hashlib.sha256((json.dumps(facts, sort_keys=True) + states_sha256).encode()).hexdigest()


def _in_the_making(path: Path) -> bool:
    return path.suffix == _PARTIAL and Path("/proc", path.stem.rpartition(".")[2]).exists()


def _size_bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.iterdir() if file.is_file())
