"""The manifest of a variant: reading, validation and checksums of the files."""

import json
from pathlib import Path
from typing import Any

import pytest

from config.errors import ManifestError
from config.manifest import Manifest, Scheme, sha256_of
from config.quantization import QuantizationArgs, grouped
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


FIRST: dict[str, Any] = {"sym": True, "desc_act": False, "activation_bits": 16, "format": "gptq"}
INTS = QuantizationArgs(num_bits=4, strategy="group", group_size=64)


@pytest.mark.parametrize(
    "first,compression,weights,inputs",
    [
        ({"bits": 4, "group_size": 64}, "gptq", INTS, None),
        ({"bits": 4, "group_size": 64, "sym": False}, "gptq", INTS.model_copy(update={"symmetric": False}), None),
        ({"bits": 8, "group_size": -1, "desc_act": True}, "gptq", grouped(8, -1, actorder="group"), None),
        ({"bits": 4, "group_size": 64, "format": "compressed-tensors"}, "pack-quantized", INTS, None),
        (
            {"bits": 8, "group_size": -1, "format": "compressed-tensors", "activation_bits": 8},
            "int-quantized",
            QuantizationArgs(strategy="channel"),
            QuantizationArgs(strategy="token", dynamic=True),
        ),
    ],
)
def test_schemes_of_older_versions(
    first: dict[str, Any], compression: str, weights: QuantizationArgs, inputs: QuantizationArgs | None
) -> None:
    """They are read into the words of compressed-tensors, written with both, and digested by what they had."""
    old = {"name": "x", **FIRST, **first, "overrides": [{"modules": "*.o_proj", "bits": None, "group_size": None}]}
    scheme = Scheme.model_validate(old)
    assert (scheme.compression, scheme.weights, scheme.input_activations) == (compression, weights, inputs)
    written = scheme.model_dump(mode="json")
    assert {key: written[key] for key in old} == old
    assert Scheme.model_validate(written) == scheme
    assert scheme.identity() == old


def test_schemes_with_floats_have_a_digest_of_all() -> None:
    """The first keys don't tell FP8 from int8."""
    scheme = Scheme(
        name="fp8-dynamic",
        compression="float-quantized",
        weights=QuantizationArgs(type="float", strategy="channel"),
        input_activations=QuantizationArgs(type="float", strategy="token", dynamic=True),
    )
    written = scheme.model_dump(mode="json")
    assert (written["bits"], written["activation_bits"], written["format"]) == (8, 8, "compressed-tensors")
    assert scheme.precision == "fp8"
    assert scheme.identity() == written
    assert Scheme.model_validate(written) == scheme
