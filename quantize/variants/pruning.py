"""What a folder of variants can do without: remains of stopped runs, variants that failed or were replaced."""

import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from config.errors import ManifestError
from config.manifest import FILE_NAME, Manifest
from quantize.errors import TargetError
from quantize.running.files import is_alive
from quantize.running.stage_store import StageStore, is_locked

_STAGED = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)\.partial")
_SOLVING = re.compile(r"\.(?P<name>.+)\.solving")
_DAY_SECONDS = 86_400
# Of $QUANTGATE_HOME, before stages had one place.
_OLD_CACHES = ("parents", "sensitivity", "self-generated")


@dataclass(frozen=True, slots=True)
class Disposable:
    """A directory that can go, why, and what that frees."""

    path: Path
    reason: str
    bytes: int


def disposables(place: Path, *, older_than_days: float, failed: bool, superseded: bool) -> list[Disposable]:
    """List what can go from a folder of variants; links, and directories that were never sealed, are left alone."""
    if not place.is_dir():
        raise TargetError(f"{place}: no such directory")
    if (place / FILE_NAME).exists():
        raise TargetError(f"{place}: is a variant; pass the directory that holds it")
    folders = sorted(path for path in place.iterdir() if path.is_dir() and not path.is_symlink())
    reasons = dict(_remains(folders, time.time() - older_than_days * _DAY_SECONDS))
    variants = dict(_sealed(folders))
    reasons |= failures(variants) if failed else {}
    reasons |= replaced(variants) if superseded else {}
    return [Disposable(path, reason, _size_bytes(path)) for path, reason in reasons.items()]


def stage_disposables(store: StageStore, *, keep_bytes: int, older_than_days: float) -> list[Disposable]:
    """List results of stages beyond `keep_bytes`, unfinished ones that no run continued, and caches of old versions."""
    before_seconds = time.time() - older_than_days * _DAY_SECONDS
    unfinished = [entry for entry in store.entries() if not entry.evictable and entry.used_seconds < before_seconds]
    caches = [store.root.parent / name for name in _OLD_CACHES]
    return [
        *(
            Disposable(entry.path, f"beyond --keep-bytes: {entry.name}", entry.bytes)
            for entry in store.excess(keep_bytes)
        ),
        *(Disposable(entry.path, f"no run has continued this {entry.name}", entry.bytes) for entry in unfinished),
        *(Disposable(path, "a cache of an older version", _size_bytes(path)) for path in caches if path.is_dir()),
    ]


def failures(variants: dict[Path, Manifest]) -> dict[Path, str]:
    """Name the variants that missed a limit."""
    return {path: "its verdict is fail" for path, manifest in variants.items() if manifest.quality.verdict == "fail"}


def replaced(variants: dict[Path, Manifest]) -> dict[Path, str]:
    """Name the variants of which there is a newer one that passed, of the same base and scheme."""
    found = {}
    for path, manifest in variants.items():
        newer = [
            other
            for other in variants.values()
            if (other.base.digest, other.scheme) == (manifest.base.digest, manifest.scheme)
            and other.created > manifest.created
            and other.quality.verdict == "pass"
        ]
        if newer:
            found[path] = f"{max(newer, key=lambda other: other.created).id} replaces it"
    return found


def remove(found: Sequence[Disposable]) -> Iterator[Disposable]:
    """Remove directories one by one; each loses its name first, so that none is ever seen half removed."""
    for disposable in found:
        doomed = disposable.path
        if not doomed.name.startswith("."):
            doomed = disposable.path.with_name(f".{disposable.path.name}.{os.getpid()}.partial")
            disposable.path.rename(doomed)
        shutil.rmtree(doomed)
        yield disposable


def _remains(folders: Sequence[Path], before_seconds: float) -> Iterator[tuple[Path, str]]:
    for path in folders:
        staged, solving = _STAGED.fullmatch(path.name), _SOLVING.fullmatch(path.name)
        if staged and not is_alive(int(staged["pid"])):
            yield path, f"process {staged['pid']} that made {staged['name']} is gone"
        elif solving and _newest_seconds(path) < before_seconds and not is_locked(path):
            days = (time.time() - _newest_seconds(path)) / _DAY_SECONDS
            yield path, f"{solving['name']} was not resumed for {days:.0f} days"


def _sealed(folders: Sequence[Path]) -> Iterator[tuple[Path, Manifest]]:
    for path in folders:
        if path.name.startswith(".") or not (path / FILE_NAME).is_file():
            continue
        try:
            manifest = Manifest.read(path)
        except ManifestError:
            continue  # whatever it is, it isn't ours to remove
        # An adopted one was made by another tool, and may be the only copy.
        if manifest.calibration is not None:
            yield path, manifest


def _newest_seconds(folder: Path) -> float:
    return max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))


def _size_bytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
