"""Results of stages on disk: `$QUANTGATE_HOME/stages/<stage>-<digest>`, one directory for each.

The digest covers everything that decides a result, so an equal stage of a later run finds it. A directory is written
beside its place, synced and renamed: it is there as a whole or not at all. `stage.json` lists its files with their
checksums; a directory that does not match counts as missing and is removed.

| directory | state |
| --- | --- |
| `solve-<digest>` | complete |
| `.solve-<digest>.partial` | resumable: one process at a time works on it, and the next one continues |
| `.parent-states-<digest>.<pid>.partial` | being written; removed when it fails or when the process is gone |
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config.load import home_directory
from config.manifest import sha256_of
from quantize.errors import BusyError
from quantize.running.files import is_alive, sync_tree

# Raise this when results of older versions would be read wrongly.
_FORMAT = 1
_RECORD, _LOCK, _USED = "stage.json", "lock", ".used"
_PARTIAL = re.compile(r"\.(?P<key>.+?)(\.(?P<pid>\d+))?\.partial")
# Results of less than this are evicted last: they free little.
_SMALL_BYTES = 16_000_000
DEFAULT_KEEP_BYTES = 20_000_000_000


@dataclass(frozen=True, slots=True)
class StageKey:
    """The name of a stage and a digest of its inputs."""

    name: str
    digest: str

    def __str__(self) -> str:
        """The name of its directory."""
        return f"{self.name}-{self.digest}"


@dataclass(frozen=True, slots=True)
class StageResult:
    """A complete result: its directory and the JSON object that was kept with it."""

    key: StageKey
    directory: Path
    facts: dict[str, Any]

    def files(self) -> list[Path]:
        """List its files, without those of the store itself."""
        return _files(self.directory)


@dataclass(frozen=True, slots=True)
class StageEntry:
    """A directory of the store. `bytes` are those that its removal frees; `unfinished` if a run stopped in it."""

    path: Path
    name: str
    subject: str
    bytes: int
    used_seconds: float
    unfinished: bool = False
    evictable: bool = True


def stage_key(name: str, **inputs: Any) -> StageKey:
    """Derive the key of a stage from its inputs, which are JSON values."""
    payload = json.dumps([_FORMAT, name, inputs], sort_keys=True, default=str)
    return StageKey(name, hashlib.sha256(payload.encode()).hexdigest()[:32])


def stage_store(environ: Mapping[str, str]) -> "StageStore":
    """Return the store below `$QUANTGATE_HOME`."""
    return StageStore(home_directory(environ) / "stages")


@dataclass(frozen=True, slots=True)
class StageStore:
    """The directory that holds the results of stages."""

    root: Path

    def find(self, key: StageKey) -> StageResult | None:
        """Look a result up and verify its files; a damaged one is removed and counts as missing."""
        directory = self.root / str(key)
        try:
            record = json.loads((directory / _RECORD).read_bytes())
            facts, complete = record["facts"], _digests(directory) == record["files"]
            complete = complete and record["sha256"] == _facts_digest(facts)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            complete = False
        if not complete:
            shutil.rmtree(directory, ignore_errors=True)
            return None
        os.utime(directory)
        return StageResult(key, directory, facts)

    @contextmanager
    def staging(self, key: StageKey) -> Iterator[Path]:
        """Lend a directory to write a result in; it is removed unless `keep` takes it."""
        staged = self.root / f".{key}.{os.getpid()}.partial"
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        try:
            yield staged
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    @contextmanager
    def resumable(self, key: StageKey) -> Iterator[Path]:
        """Lend a directory that a stopped run leaves for the next one; BusyError while another process has it."""
        folder = self.resumable_folder(key)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / _LOCK).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BusyError(
                    f"{folder}: another process computes this stage right now; wait for it, or stop it"
                ) from None
            try:
                yield folder
            finally:
                if folder.is_dir() and [path.name for path in folder.iterdir()] == [_LOCK]:
                    shutil.rmtree(folder, ignore_errors=True)

    def resumable_folder(self, key: StageKey) -> Path:
        """Return where the unfinished result of a resumable stage is."""
        return self.root / f".{key}.partial"

    def keep(
        self, key: StageKey, staged: Path, facts: Mapping[str, Any], *, subject: str = "", cache: bool = True
    ) -> StageResult:
        """Complete a lent directory and give it its name.

        `subject` says what it belongs to, for people. Without `cache` it is never evicted before `release`: it is the
        unfinished work of a run.
        """
        (staged / _LOCK).unlink(missing_ok=True)
        plain = json.loads(json.dumps(facts))
        record = {
            "stage": key.name,
            "subject": subject,
            "cache": cache,
            "facts": plain,
            "sha256": _facts_digest(plain),
            "files": _digests(staged),
        }
        (staged / _RECORD).write_text(json.dumps(record))
        sync_tree(staged)
        directory = self.root / str(key)
        try:
            staged.rename(directory)
        except OSError:  # another process wrote the same result meanwhile
            shutil.rmtree(directory, ignore_errors=True)
            staged.rename(directory)
        return StageResult(key, directory, plain)

    def forget(self, key: StageKey) -> None:
        """Remove a result and what a stopped run left of it."""
        for path in (self.root / str(key), self.resumable_folder(key)):
            shutil.rmtree(path, ignore_errors=True)

    def release(self, key: StageKey) -> None:
        """Say that the run that needed a result is done: from now on it may be evicted."""
        directory = self.root / str(key)
        if directory.is_dir():
            (directory / _USED).touch()

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """Lend a directory on the same filesystem for jobs, logs and temporary files; it is removed afterwards."""
        with self.staging(StageKey("scratch", "run")) as folder:
            yield folder

    def sweep(self) -> None:
        """Remove what processes that are gone were writing."""
        for path in self._directories():
            match = _PARTIAL.fullmatch(path.name)
            if match and match["pid"] and not is_alive(int(match["pid"])):
                shutil.rmtree(path, ignore_errors=True)

    def entries(self) -> list[StageEntry]:
        """List complete and unfinished results, longest unused first; not those that a process works on."""
        found = [entry for path in self._directories() if (entry := _entry(path)) is not None]
        return sorted(found, key=lambda entry: (entry.used_seconds, entry.path.name))

    def excess(self, keep_bytes: int) -> list[StageEntry]:
        """Choose what to evict so that at most `keep_bytes` stay: the longest unused first, small results last."""
        candidates = [entry for entry in self.entries() if entry.evictable]
        excess = sum(entry.bytes for entry in candidates) - keep_bytes
        chosen: list[StageEntry] = []
        for entry in sorted(candidates, key=lambda entry: (entry.bytes < _SMALL_BYTES, entry.used_seconds)):
            if excess <= 0:
                break
            chosen.append(entry)
            excess -= entry.bytes
        return chosen

    def trim(self, keep_bytes: int = DEFAULT_KEEP_BYTES) -> None:
        """Evict results beyond `keep_bytes`, and what processes that are gone were writing."""
        self.sweep()
        for entry in self.excess(keep_bytes):
            shutil.rmtree(entry.path, ignore_errors=True)

    def _directories(self) -> list[Path]:
        return sorted(path for path in self.root.iterdir() if path.is_dir()) if self.root.is_dir() else []


def is_locked(folder: Path) -> bool:
    """Tell whether a process works in a resumable directory."""
    lock = folder / _LOCK
    if not lock.is_file():
        return False
    with lock.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _entry(path: Path) -> StageEntry | None:
    match = _PARTIAL.fullmatch(path.name)
    if match:
        if match["pid"] or is_locked(path):
            return None
        name = match["key"].rpartition("-")[0]
        return StageEntry(path, name, "", _freed_bytes(path), _newest_seconds(path), unfinished=True, evictable=False)
    try:
        record = json.loads((path / _RECORD).read_bytes())
        name, subject, cache = record["stage"], record["subject"], record["cache"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    evictable = cache or (path / _USED).exists()
    return StageEntry(path, name, subject, _freed_bytes(path), path.stat().st_mtime, evictable=evictable)


def _digests(directory: Path) -> dict[str, str]:
    return {str(path.relative_to(directory)): sha256_of(path) for path in _files(directory)}


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file() and path.name not in (_RECORD, _LOCK, _USED))


def _facts_digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _freed_bytes(directory: Path) -> int:
    """Sum the files that no other name keeps alive."""
    stats = (path.lstat() for path in directory.rglob("*") if path.is_file())
    return sum(stat.st_size for stat in stats if stat.st_nlink == 1)


def _newest_seconds(folder: Path) -> float:
    return max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
