"""Only what is stale, failed or replaced goes, and only from the folder that was named."""

import fcntl
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from quantize.errors import TargetError
from quantize.schemes.scheme import preset
from quantize.variants.pruning import disposables, remove
from tests.quantize.manifests import quality, write_manifest

OLD_SECONDS = 1_000_000_000


def found(place: Path, *, failed: bool = True, superseded: bool = True) -> dict[str, str]:
    """Names and reasons of what can go."""
    listed = disposables(place, older_than_days=7, failed=failed, superseded=superseded)
    return {one.path.name: one.reason for one in listed}


def dead_pid() -> int:
    """The number of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        child.wait()
    return child.pid


def aged(folder: Path) -> Path:
    """A folder with a file in it, untouched for years."""
    folder.mkdir()
    (folder / "layer-0.json").write_text("{}")
    for path in (folder / "layer-0.json", folder):
        os.utime(path, (OLD_SECONDS, OLD_SECONDS))
    return folder


def test_remains_of_dead_runs_go(tmp_path: Path) -> None:
    """A staging folder whose process is gone, and a resume folder that nobody came back to."""
    gone = tmp_path / f".v.{dead_pid()}.partial"
    gone.mkdir()
    (tmp_path / f".w.{os.getppid()}.partial").mkdir()
    aged(tmp_path / ".v.solving")
    (tmp_path / ".fresh.solving").mkdir()
    (tmp_path / ".git").mkdir()
    assert set(found(tmp_path, failed=False, superseded=False)) == {gone.name, ".v.solving"}


def test_a_run_in_progress_keeps_its_folder(tmp_path: Path) -> None:
    """However old: its lock is held."""
    folder = aged(tmp_path / ".v.solving")
    lock = folder / "lock"
    lock.touch()
    for path in (lock, folder):
        os.utime(path, (OLD_SECONDS, OLD_SECONDS))
    with lock.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert found(tmp_path) == {}
    assert set(found(tmp_path)) == {".v.solving"}


def test_failed_and_replaced_variants_go_when_asked(tmp_path: Path) -> None:
    """A replacement is newer, passed, and has the same base and scheme."""
    later = datetime(2026, 11, 2, tzinfo=UTC)
    write_manifest(tmp_path / "old")
    write_manifest(tmp_path / "new", created=later, id="smol-int4-new")
    write_manifest(tmp_path / "finer", scheme=preset("w4a16-g32"))
    write_manifest(tmp_path / "bad", created=later, scheme=preset("w8a8"), quality=quality(verdict="fail"))
    write_manifest(tmp_path / "good", scheme=preset("w8a8"))
    assert found(tmp_path) == {"bad": "its verdict is fail", "old": "smol-int4-new replaces it"}
    assert set(found(tmp_path, failed=False)) == {"old"}
    assert set(found(tmp_path, superseded=False)) == {"bad"}
    assert found(tmp_path, failed=False, superseded=False) == {}


def test_what_is_not_ours_stays(tmp_path: Path) -> None:
    """No base, no broken manifest, no adopted directory, nothing behind a link."""
    failing = quality(verdict="fail")
    outside = tmp_path / "outside"
    write_manifest(outside / "far", quality=failing)
    place = tmp_path / "place"
    write_manifest(place / "adopted", quality=failing, calibration=None)
    (place / "base").mkdir()
    (place / "broken").mkdir()
    (place / "broken" / "manifest.json").write_text("{")
    (place / "link").symlink_to(outside / "far")
    assert found(place) == {}


def test_removing_takes_the_name_first(tmp_path: Path) -> None:
    """What is listed goes, with its size told; the rest stays."""
    write_manifest(tmp_path / "bad", quality=quality(verdict="fail"))
    write_manifest(tmp_path / "good", scheme=preset("w8a8"))
    listed = disposables(tmp_path, older_than_days=7, failed=True, superseded=True)
    assert [one.bytes for one in listed] == [(tmp_path / "bad" / "manifest.json").stat().st_size]
    assert [one.path.name for one in remove(listed)] == ["bad"]
    assert [path.name for path in tmp_path.iterdir()] == ["good"]


def test_a_variant_is_no_folder_of_variants(tmp_path: Path) -> None:
    """The place must hold variants, not be one."""
    write_manifest(tmp_path / "v")
    with pytest.raises(TargetError, match="is a variant; pass the directory that holds it"):
        found(tmp_path / "v")
    with pytest.raises(TargetError, match="no such directory"):
        found(tmp_path / "missing")
