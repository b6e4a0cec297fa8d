"""The manifest of a variant: reading, validation and checksums of the files."""

import json
from pathlib import Path
from typing import Any

import pytest

from config.errors import ManifestError
from config.manifest import Manifest, sha256_of
from tests.config.sealed import seal


def test_sealed_directory_reads_back(tmp_path: Path) -> None:
    """A written manifest reads back equal, and all checksums match."""
    manifest = seal(tmp_path, bits=4)
    assert Manifest.read(tmp_path) == manifest
    assert manifest.altered_files(tmp_path) == []
    assert manifest.bytes == 7
    assert manifest.scheme.precision == "int4"


@pytest.mark.parametrize("content", [b"weighty", b"weights!", None])
def test_altered_file_is_named(tmp_path: Path, content: bytes | None) -> None:
    """A changed byte, another length and a missing file are detected."""
    manifest = seal(tmp_path, bits=4)
    (tmp_path / "model.safetensors").unlink()
    if content is not None:
        (tmp_path / "model.safetensors").write_bytes(content)
    assert manifest.altered_files(tmp_path) == ["model.safetensors"]


@pytest.mark.parametrize(
    "change,word",
    [
        ({"format": 2}, "format"),
        ({"extra": 1}, "extra"),
        ({"files": {}}, "files"),
        ({"quality": {}}, "quality.dataset_sha256"),
    ],
)
def test_invalid_manifest(tmp_path: Path, change: dict[str, Any], word: str) -> None:
    """Unknown, missing and invalid keys are errors that name the key."""
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({**json.loads(seal(tmp_path, bits=4).to_json()), **change}))
    with pytest.raises(ManifestError, match=word):
        Manifest.read(tmp_path)


def test_missing_manifest(tmp_path: Path) -> None:
    """The error for a missing manifest names the command that creates one."""
    with pytest.raises(ManifestError, match="quantgate quantize"):
        Manifest.read(tmp_path)


def test_digest_is_sha256(tmp_path: Path) -> None:
    """The digest is the one that `sha256sum` prints."""
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_of(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
