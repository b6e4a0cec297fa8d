"""Variant directories appear whole or not at all: written beside, synced, renamed, swept after a crash."""

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from config.errors import ManifestError
from config.manifest import FILE_NAME, Manifest, SealedFile, sha256_of
from quantize.errors import TargetError
from quantize.running.files import is_alive, sync, sync_tree

_WORK = ".work"
_UNSEALED = frozenset({FILE_NAME, "capacity.json"})


@contextmanager
def staging(out: Path) -> Iterator[Path]:
    """Lend a hidden directory beside `out`; rename it to `out` if the body succeeds, remove it if not."""
    parent = out.resolve().parent
    staged = parent / f".{out.resolve().name}.{os.getpid()}.partial"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        sweep(out)
        staged.mkdir()
    except OSError as error:
        raise TargetError(f"{out}: can't be written: {error.strerror}; choose another --out") from None
    try:
        yield staged
        shutil.rmtree(staged / _WORK, ignore_errors=True)
        sync_tree(staged)
        _publish(staged, out.resolve())
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    sync(parent)


def work_folder(staged: Path) -> Path:
    """Make the folder in a staging directory for what must not survive it: jobs, logs, raw tensors."""
    folder = staged / _WORK
    folder.mkdir(exist_ok=True)
    return folder


def sweep(out: Path) -> list[Path]:
    """Remove what dead processes left staged for `out`."""
    target = out.resolve()
    pattern = re.compile(rf"\.{re.escape(target.name)}\.(\d+)\.partial")
    if not target.parent.is_dir():
        return []
    stale = [
        path
        for path in target.parent.iterdir()
        if (match := pattern.fullmatch(path.name)) and not is_alive(int(match[1]))
    ]
    for path in stale:
        shutil.rmtree(path, ignore_errors=True)
    return stale


def sealed_files(directory: Path) -> dict[str, SealedFile]:
    """Digest every file of a variant but its manifest, and what is measured on each machine anew."""
    files = sorted(path for path in directory.iterdir() if path.is_file() and path.name not in _UNSEALED)
    return {path.name: SealedFile(sha256=sha256_of(path), bytes=path.stat().st_size) for path in files}


def seal(directory: Path, manifest: Mapping[str, object]) -> Manifest:
    """Complete a manifest with the files' checksums and write it: the last file of a variant."""
    sealed = Manifest.model_validate(
        {**manifest, "created": datetime.now(UTC).replace(microsecond=0), "files": sealed_files(directory)},
    )
    draft = directory / f".{FILE_NAME}.{os.getpid()}"
    try:
        draft.write_text(sealed.to_json())
        draft.rename(directory / FILE_NAME)
    finally:
        draft.unlink(missing_ok=True)
    return sealed


def reusable(out: Path, variant_id: str) -> Manifest | None:
    """Return the manifest of `out` if it is this very variant; TargetError if something else is in the way."""
    if not out.exists() and not out.is_symlink():
        return None
    if out.is_dir() and not any(out.iterdir()):
        return None
    if not out.is_dir():
        raise TargetError(f"{out}: is a file; choose another --out")
    try:
        manifest = Manifest.read(out)
    except ManifestError:
        raise TargetError(f"{out}: exists and is no sealed variant; choose another --out or remove it") from None
    if manifest.id != variant_id:
        raise TargetError(
            f"{out}: holds {manifest.id}, and this recipe makes {variant_id}; choose another --out or remove it",
        )
    changed = [name for name, file in manifest.files.items() if not _has_size(out / name, file.bytes)]
    if changed:
        raise TargetError(f"{out}: {changed[0]} was altered since it was sealed; remove the directory to make it anew")
    return manifest


def require_target(out: Path) -> None:
    """Raise TargetError for a path that no variant can be written to; `{id}` in it is not known yet."""
    if "{id}" not in out.name and (out.exists() or out.is_symlink()) and not out.is_dir():
        raise TargetError(f"{out}: is a file; choose another --out")
    folder = _existing(out.parent)
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise TargetError(f"{out}: {folder} is not writable; choose another --out")


def require_space(needed: Mapping[Path, tuple[int, str]]) -> None:
    """Raise TargetError unless every filesystem has room for all that will be written to it.

    `needed` maps paths to bytes, and to what to do where they are not free.
    """
    filesystems: dict[int, tuple[int, list[tuple[Path, str]]]] = {}
    for path, (count_bytes, advice) in needed.items():
        folder = _existing(path)
        total, paths = filesystems.get(folder.stat().st_dev, (0, []))
        # Files of one filesystem are linked, and take their room once.
        filesystems[folder.stat().st_dev] = (max(total, count_bytes), [*paths, (path, advice)])
    for count_bytes, paths in filesystems.values():
        path, advice = paths[0]
        free = shutil.disk_usage(_existing(path)).free
        if free < count_bytes:
            raise TargetError(
                f"no disk space for {path}: {_gigabytes(count_bytes)} needed, {_gigabytes(free)} free; "
                f"free some or {advice}",
            )


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.resolve().parents) if folder.exists())


def _publish(staged: Path, out: Path) -> None:
    try:
        staged.rename(out)
    except OSError as error:
        raise TargetError(
            f"{out}: appeared while the variant was made ({error.strerror}); nothing was replaced"
        ) from None


def _has_size(path: Path, size_bytes: int) -> bool:
    return path.is_file() and path.stat().st_size == size_bytes


def _gigabytes(count_bytes: int) -> str:
    return f"{count_bytes / 1e9:.2f} GB"
