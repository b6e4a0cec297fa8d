"""Checksum verification before each start: a variant with a changed file is never served.

Sizes are always compared. Digests need all bytes (a minute for 60 GB), so they are cached for as long as a file's size,
inode and times are the same; no program can set the change time.
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
    """The check was stopped."""


def resized_files(directory: Path, manifest: Manifest) -> list[str]:
    """Return the files of the manifest that are missing or of another size, without reading them."""
    return [name for name, sealed in manifest.files.items() if not _has_size(directory / name, sealed)]


@dataclass(slots=True)
class SealCheck:
    """Compares the files of a variant with its manifest; `memory` is the folder of the digest cache."""

    directory: Path
    memory: Path
    stopped: Callable[[], bool] = field(default=lambda: False)

    def altered_files(self, manifest: Manifest) -> list[str]:
        """Return the files of the manifest that are missing or changed; Interrupted if `stopped` returns true."""
        known, current = self._read_cache(), {}
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
                current[name] = {"stamp": stamp, "sha256": digest}
        if current != known:
            self._write_cache(current)
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
    def _cache_file(self) -> Path:
        return self.memory / f"{hashlib.sha256(bytes(self.directory.resolve())).hexdigest()[:32]}.json"

    def _read_cache(self) -> dict[str, Any]:
        try:
            digests = json.loads(self._cache_file.read_bytes())
        except (OSError, ValueError):
            return {}
        return digests if isinstance(digests, dict) else {}

    def _write_cache(self, digests: Mapping[str, Any]) -> None:
        """Replace the cache atomically; if that fails, the files are read again next time."""
        draft = self._cache_file.with_suffix(f".{os.getpid()}")
        try:
            self.memory.mkdir(parents=True, exist_ok=True)
            draft.write_text(json.dumps(digests))
            draft.replace(self._cache_file)
        except OSError:
            with suppress(OSError):
                draft.unlink()


def _has_size(path: Path, sealed: SealedFile) -> bool:
    return path.is_file() and path.stat().st_size == sealed.bytes


def _stamp(path: Path) -> list[int]:
    """Fields that change with a file; only the kernel sets ctime."""
    status = path.stat()
    return [status.st_size, status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]
