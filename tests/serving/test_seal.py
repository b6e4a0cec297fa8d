"""A changed byte is found before each start; files that did not change are read once."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from config.manifest import Manifest
from serving.seal import Interrupted, SealCheck, resized_files
from tests.serving.sealed import seal_directory

WEIGHTS = "model.safetensors"


@pytest.fixture
def sealed(tmp_path: Path) -> tuple[Path, Manifest]:
    """A variant of two files, with its manifest."""
    variant = tmp_path / "v"
    variant.mkdir()
    (variant / WEIGHTS).write_bytes(b"weights")
    (variant / "config.json").write_text("{}")
    return variant, seal_directory(variant)


def same_size(path: Path) -> None:
    """Change a byte and put the time of the last change back, as a careless copy might."""
    before = path.stat()
    path.write_bytes(b"Weights")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(
    "spoil,by_size",
    [
        (lambda path: None, False),
        (same_size, False),
        (lambda path: path.write_bytes(b"weight"), True),
        (lambda path: path.unlink(), True),
    ],
)
@pytest.mark.parametrize("known", [False, True])
def test_a_changed_byte_is_found(
    sealed: tuple[Path, Manifest], tmp_path: Path, spoil: Callable[[Path], None], by_size: bool, known: bool
) -> None:
    """Whether the files were read before or not; what changes the size is found without reading."""
    variant, manifest = sealed
    check = SealCheck(variant, tmp_path / "memory")
    if known:
        assert check.altered_files(manifest) == []
    spoil(variant / WEIGHTS)
    untouched = not by_size and (variant / WEIGHTS).read_bytes() == b"weights"
    assert check.altered_files(manifest) == ([] if untouched else [WEIGHTS])
    assert resized_files(variant, manifest) == ([WEIGHTS] if by_size else [])


def test_unchanged_files_are_not_read_again(sealed: tuple[Path, Manifest], tmp_path: Path) -> None:
    """The second check reads nothing: told to stop at the first byte, it ends all the same."""
    variant, manifest = sealed
    with pytest.raises(Interrupted):
        SealCheck(variant, tmp_path / "memory", stopped=lambda: True).altered_files(manifest)
    assert SealCheck(variant, tmp_path / "memory").altered_files(manifest) == []
    assert SealCheck(variant, tmp_path / "memory", stopped=lambda: True).altered_files(manifest) == []
    same_size(variant / WEIGHTS)
    with pytest.raises(Interrupted):
        SealCheck(variant, tmp_path / "memory", stopped=lambda: True).altered_files(manifest)


@pytest.mark.parametrize("notes", ["{", "[]", '{"model.safetensors": {}}'])
def test_broken_notes_are_no_notes(sealed: tuple[Path, Manifest], tmp_path: Path, notes: str) -> None:
    """What can't be read is learnt anew."""
    variant, manifest = sealed
    check = SealCheck(variant, tmp_path / "memory")
    check.altered_files(manifest)
    (path,) = (tmp_path / "memory").iterdir()
    path.write_text(notes)
    assert check.altered_files(manifest) == []
    assert set(json.loads(path.read_text())) == {WEIGHTS, "config.json"}


def test_without_a_place_for_notes_the_files_are_read(sealed: tuple[Path, Manifest], tmp_path: Path) -> None:
    """A file in the folder's place costs time, not safety."""
    variant, manifest = sealed
    (tmp_path / "memory").write_text("")
    assert SealCheck(variant, tmp_path / "memory").altered_files(manifest) == []
    same_size(variant / WEIGHTS)
    assert SealCheck(variant, tmp_path / "memory").altered_files(manifest) == [WEIGHTS]
