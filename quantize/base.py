"""The base: an unquantized transformers model directory, read without torch."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from config.manifest import sha256_of
from quantize.errors import RecipeError
from quantize.modules import ModuleTree, direct_tree

_MODEL_SUFFIXES = frozenset({".safetensors", ".json", ".jinja", ".model", ".txt"})
# Sealed or measured by us beside a model; they say nothing about what the model computes.
_NOT_THE_MODEL = frozenset({"manifest.json", "capacity.json"})
_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
_BLOCK = re.compile(r"(^|\.)(layers|h|blocks)\.\d+\.")
_SIZE_WORDS = {"hidden size": "hidden_size", "intermediate size": "intermediate_size"}
# What a client-visible model is besides its weights: copied to variants byte for byte, never saved again.
KEPT_FILES = (
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """What a safetensors header says of one tensor."""

    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A base that was found in order: safetensors weights with a config beside them.

    `tensors` are all that it stores; `shapes` maps the linear layers that can be quantized to (out_features,
    in_features). `tree` says how the solver names them, once it was asked (`quantize.module_tree`); until then
    `shapes` are all matrices in blocks.
    """

    directory: Path
    name: str
    dtype: str
    digest: str
    bytes: int
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, int]]
    tensors: Mapping[str, StoredTensor] = field(default_factory=dict)
    tree: ModuleTree | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """Well-known dimensions by the word people use for them."""
        return {word: self.config[key] for word, key in _SIZE_WORDS.items() if isinstance(self.config.get(key), int)}

    @property
    def modules(self) -> ModuleTree:
        """The layers that can be quantized; without the solver's tree each has the name of its tensor."""
        return self.tree or direct_tree(self.shapes)


def read_base(directory: Path, *, digested: bool = True) -> BaseModel:
    """Read a base directory; RecipeError says what is missing.

    The digest takes reading every byte; without `digested` it stays empty, which is enough for a forecast.
    """
    config = _read_config(directory)
    weights = weight_files(directory)
    _require_weights(directory, weights)
    files = model_files(directory)
    tensors = stored_tensors(directory, weights)
    return BaseModel(
        directory=directory,
        name=directory.resolve().name,
        dtype=_dtype_of(config),
        digest=digest_of({file.name: sha256_of(file) for file in files}) if digested else "",
        bytes=sum(file.stat().st_size for file in files),
        config=config,
        shapes=linear_shapes(tensors),
        tensors=tensors,
    )


def weight_files(directory: Path) -> list[Path]:
    """List the safetensors files of a model directory in a stable order."""
    return sorted(directory.glob("*.safetensors"))


def model_files(directory: Path) -> list[Path]:
    """List the files that decide what a model computes."""
    return sorted(
        file
        for file in directory.iterdir()
        if file.suffix in _MODEL_SUFFIXES
        and not file.name.startswith(".")
        and file.name not in _NOT_THE_MODEL
        and file.is_file()
    )


def kept_files(directory: Path) -> list[Path]:
    """List the tokenizer, template and generation files that a variant takes over byte for byte."""
    return [directory / name for name in KEPT_FILES if (directory / name).is_file()]


def digest_of(digests: Mapping[str, str]) -> str:
    """Digest a set of files from their names and sha256 sums, independent of where they lie."""
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def stored_tensors(directory: Path, weights: list[Path]) -> dict[str, StoredTensor]:
    """Read the headers of a model's weight files, of those that its index names if it has one."""
    index = directory / "model.safetensors.index.json"
    wanted = set(json.loads(index.read_bytes())["weight_map"].values()) if index.is_file() else None
    tensors: dict[str, StoredTensor] = {}
    for file in weights:
        if wanted is None or file.name in wanted:
            tensors |= read_header(file)
    return tensors


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Read a safetensors header: 8 bytes of little-endian length, then JSON."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= file.stat().st_size:
                raise RecipeError(f"{file}: not a safetensors file; copy the model again")
            header = json.loads(stream.read(length))
    except ValueError:
        raise RecipeError(f"{file}: its safetensors header is damaged; copy the model again") from None
    return {name: _stored(entry) for name, entry in header.items() if name != "__metadata__"}


def linear_shapes(tensors: Mapping[str, StoredTensor]) -> dict[str, tuple[int, int]]:
    """Map the linear layers inside a model's blocks to (out_features, in_features)."""
    return {
        name.removesuffix(".weight"): (tensor.shape[0], tensor.shape[1])
        for name, tensor in tensors.items()
        if name.endswith(".weight") and len(tensor.shape) == 2 and _BLOCK.search(name)
    }


def _stored(entry: Mapping[str, Any]) -> StoredTensor:
    start, end = entry["data_offsets"]
    return StoredTensor(tuple(entry["shape"]), end - start)


def slug(name: str) -> str:
    """Reduce a name to lower-case letters, digits, dots and single hyphens."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.") or "model"


def _read_config(directory: Path) -> dict[str, Any]:
    if not directory.is_dir():
        raise RecipeError(f"{directory}: no such model directory")
    path = directory / "config.json"
    if not path.is_file():
        raise RecipeError(f"{directory}: not a transformers model: it has no config.json")
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise RecipeError(f"{path}: not JSON ({error}); copy the model again") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise RecipeError(f"{path}: not a transformers model: it names no model_type")
    if "quantization_config" in config:
        raise RecipeError(f"{directory}: is already quantized; quantize its unquantized parent instead")
    return config


def _require_weights(directory: Path, weights: list[Path]) -> None:
    if weights:
        return
    if any(directory.glob("*.bin")):
        raise RecipeError(f"{directory}: has only .bin weights; save the model as safetensors first")
    if any(directory.glob("*.gguf")):
        raise RecipeError(f"{directory}: has only GGUF weights; run `python -m quantize.gguf FILE OUT_DIR` first")
    raise RecipeError(f"{directory}: not a transformers model: it has no *.safetensors weights")


def _dtype_of(config: Mapping[str, Any]) -> str:
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return _DTYPES.get(name, name)
