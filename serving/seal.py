"""A variant with a changed byte is never served: its files are held against its manifest before each start.

Sizes cost nothing and are compared every time. Digests take reading every byte (a minute for 60 GB), so they are
remembered for as long as a file's stamp stays: its size, inode and times, of which no program can set the last.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from config.manifest import Manifest, SealedFile

_CHUNK_BYTES = 1 << 20


class Interrupted(Exception):
    """Nobody waits for the answer any more."""


def resized_files(directory: Path, manifest: Manifest) -> list[str]:
    """Name the sealed files that are missing or of another size; reads none of them."""
    return [name for name, sealed in manifest.files.items() if not _has_size(directory / name, sealed)]


@dataclass(slots=True)
class SealCheck:
    """Compares one variant's files with its seal; `memory` is the folder that keeps what was read before."""

    directory: Path
    memory: Path
    stopped: Callable[[], bool] = field(default=lambda: False)

    def altered_files(self, manifest: Manifest) -> list[str]:
        """Name the sealed files that are missing or changed; Interrupted if told to stop on the way."""
        known, seen = self._recall(), {}
        altered = []
        for name, sealed in manifest.files.items():
            path = self.directory / name
            if not _has_size(path, sealed):
                altered.append(name)
                continue
            stamp = _stamp(path)
            digest = known[name]["sha256"] if known.get(name, {}).get("stamp") == stamp else self._digest(path)
            if digest != sealed.sha256:
                altered.append(name)
            # A file that changes while it is read must be read again.
            if _stamp(path) == stamp:
                seen[name] = {"stamp": stamp, "sha256": digest}
        if seen != known:
            self._remember(seen)
        return altered

    def _digest(self, path: Path) -> str:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                if self.stopped():
                    raise Interrupted
                digest.update(chunk)
        return digest.hexdigest()

    @property
    def _notes(self) -> Path:
        return self.memory / f"{hashlib.sha256(bytes(self.directory.resolve())).hexdigest()[:32]}.json"

    def _recall(self) -> dict[str, Any]:
        try:
            told = json.loads(self._notes.read_bytes())
        except (OSError, ValueError):
            return {}
        return told if isinstance(told, dict) else {}

    def _remember(self, seen: Mapping[str, Any]) -> None:
        """Replace the notes at once; without a place for them the files are read again next time."""
        draft = self._notes.with_suffix(f".{os.getpid()}")
        try:
            self.memory.mkdir(parents=True, exist_ok=True)
            draft.write_text(json.dumps(seen))
            draft.replace(self._notes)
        except OSError:
            with suppress(OSError):
                draft.unlink()


def _has_size(path: Path, sealed: SealedFile) -> bool:
    return path.is_file() and path.stat().st_size == sealed.bytes


def _stamp(path: Path) -> list[int]:
    """What changes when a file does; ctime is the kernel's own."""
    told = path.stat()
    return [told.st_size, told.st_dev, told.st_ino, told.st_mtime_ns, told.st_ctime_ns]
