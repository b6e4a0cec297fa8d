"""What a base must have, and the digest of what it has."""

import json
from pathlib import Path

import pytest

from quantize.base import digest_of, read_base
from quantize.errors import RecipeError
from quantize.model_files.kept_files import kept_files
from tests.quantize.models import SHAPES, safetensors_of, write_hollow_model


def test_a_base_is_read_without_torch(tmp_path: Path) -> None:
    """Name, dtype, sizes and the linear layers of its blocks come from config and headers."""
    base = read_base(write_hollow_model(tmp_path / "Smol-Chat"))
    assert (base.name, base.dtype) == ("Smol-Chat", "bf16")
    assert base.sizes == {"hidden size": 576, "intermediate size": 1536}
    assert base.shapes == {
        "model.layers.0.self_attn.q_proj": (576, 576),
        "model.layers.0.mlp.down_proj": (576, 1536),
    }


def test_only_indexed_shards_count(tmp_path: Path) -> None:
    """Where an index names the shards, another file's tensors are no part of the model."""
    directory = write_hollow_model(tmp_path / "base")
    (directory / "adapter.safetensors").write_bytes(safetensors_of({"model.layers.0.x.weight": (3, 5)}))
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(SHAPES, "model.safetensors")})
    )
    assert "model.layers.0.x" not in read_base(directory).shapes


def test_the_digest_is_of_contents(tmp_path: Path) -> None:
    """A copy elsewhere has the same digest; measurements and notes beside the model don't count."""
    one, two = write_hollow_model(tmp_path / "a" / "m"), write_hollow_model(tmp_path / "b" / "n")
    (two / "capacity.json").write_text("{}")
    (two / "README.md").write_text("hello")
    assert read_base(one).digest == read_base(two).digest
    (two / "tokenizer.json").write_text("{} ")
    assert read_base(one).digest != read_base(two).digest


def test_names_are_part_of_the_digest() -> None:
    """Two files that swap their contents are another model."""
    assert digest_of({"a": "1", "b": "2"}) != digest_of({"a": "2", "b": "1"})


def test_kept_files_are_those_that_are_there(tmp_path: Path) -> None:
    """Of the files that a variant takes over, the present ones are kept."""
    assert [file.name for file in kept_files(write_hollow_model(tmp_path / "base"))] == ["tokenizer.json"]


@pytest.mark.parametrize(
    "spoil,problem",
    [
        ({}, "no such model directory"),
        ({"other.txt": b""}, "not a transformers model: it has no config.json"),
        ({"config.json": b"{", "model.safetensors": b""}, "config.json: not JSON"),
        ({"config.json": b"[]", "model.safetensors": b""}, "not a transformers model: it names no model_type"),
        ({"config.json": b'{"model_type": "llama"}'}, "not a transformers model: it has no [*].safetensors weights"),
        ({"config.json": b'{"model_type": "llama"}', "a.bin": b""}, "has only .bin weights; save the model as"),
        ({"config.json": b'{"model_type": "llama"}', "a.gguf": b""}, "has only GGUF weights; run python -m"),
        (
            {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"abc"},
            r"model.safetensors: not a safetensors file, or truncated \(3 bytes\); copy the model again",
        ),
        (
            {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"\x02\0\0\0\0\0\0\0{{{"},
            "its safetensors header is damaged; copy the model again",
        ),
    ],
)
def test_what_is_missing_is_told(tmp_path: Path, spoil: dict[str, bytes], problem: str) -> None:
    """Each way in which a directory is no base has its own message."""
    directory = tmp_path / "base"
    for name, content in spoil.items():
        directory.mkdir(exist_ok=True)
        (directory / name).write_bytes(content)
    with pytest.raises(RecipeError, match=problem):
        read_base(directory)
