"""The base: an unquantized transformers model directory, read without torch."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from config.manifest import sha256_of
from quantize.errors import RecipeError, WeightFileError
from quantize.model_files.directory_rules import (
    Listing,
    adapter_conflict,
    ambiguous_weights,
    missing_model,
    notes,
    quantization_problem,
)
from quantize.model_files.kept_files import code_files
from quantize.model_files.safetensors_header import StoredTensor
from quantize.model_files.weight_files import read_index, stored_tensors, weight_files
from quantize.modules import ModuleTree, direct_tree

_MODEL_SUFFIXES = frozenset({".json", ".jinja", ".model", ".txt", ".tiktoken"})
# Sealed or measured by us beside a model; they say nothing about what the model computes.
_NOT_THE_MODEL = frozenset({"manifest.json", "capacity.json"})
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
_STORED_DTYPES = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}
_BLOCK = re.compile(r"(^|\.)(layers|h|blocks)\.\d+\.")
_SIZE_WORDS = {"hidden size": "hidden_size", "intermediate size": "intermediate_size"}


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A base that was found in order: safetensors weights with a config beside them.

    `tensors` are all that it stores; `shapes` maps the linear layers that can be quantized to (out_features,
    in_features). `tree` says how the solver names them, once it was asked (`quantize.module_tree`); until then
    `shapes` are all matrices in blocks. `notes` say which of its files are not used.
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
    notes: tuple[str, ...] = ()

    @property
    def sizes(self) -> dict[str, int]:
        """Well-known dimensions by the word people use for them."""
        config = text_config(self.config)
        return {word: config[key] for word, key in _SIZE_WORDS.items() if isinstance(config.get(key), int)}

    @property
    def modules(self) -> ModuleTree:
        """The layers that can be quantized; without the solver's tree each has the name of its tensor."""
        return self.tree or direct_tree(self.shapes)


def read_base(directory: Path, *, digested: bool = True) -> BaseModel:
    """Read a base directory; RecipeError says why it can't be quantized, and what to do.

    The digest takes reading every byte; without `digested` it stays empty, which is enough for a forecast.
    """
    listing = _require_model(directory)
    config = _read_config(directory)
    try:
        tensors = stored_tensors(directory)
        index = read_index(directory)
        weights = weight_files(directory)
    except WeightFileError as error:
        raise RecipeError(f"{error}; copy the model again") from None
    _require_unquantized(directory, listing, config, index, tensors)
    files = model_files(directory)
    return BaseModel(
        directory=directory,
        name=directory.resolve().name,
        dtype=_dtype_of(config, tensors),
        digest=_digest(files) if digested else "",
        bytes=sum(file.stat().st_size for file in files),
        config=config,
        shapes=linear_shapes(tensors),
        tensors=tensors,
        notes=tuple(notes(listing, frozenset(file.name for file in weights), config)),
    )


def with_digest(base: BaseModel) -> BaseModel:
    """Digest a base's files, as `read_base` does."""
    return replace(base, digest=_digest(model_files(base.directory)))


def _digest(files: Sequence[Path]) -> str:
    """Digest files side by side: hashing one takes a core a second for each gigabyte, and lets other threads run."""
    with ThreadPoolExecutor() as pool:
        return digest_of({file.name: digest for file, digest in zip(files, pool.map(sha256_of, files), strict=True)})


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Give the part of a config.json that is about the language model: `text_config`, or all of it."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def model_files(directory: Path) -> list[Path]:
    """List the files that decide what a model computes: weights that are loaded, configs, tokenizer, own code."""
    described = {
        file
        for file in directory.iterdir()
        if file.suffix in _MODEL_SUFFIXES
        and not file.name.startswith(".")
        and file.name not in _NOT_THE_MODEL
        and file.is_file()
    }
    return sorted(described | set(weight_files(directory)) | code_files(directory))


def digest_of(digests: Mapping[str, str]) -> str:
    """Digest a set of files from their names and sha256 sums, independent of where they lie."""
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def linear_shapes(tensors: Mapping[str, StoredTensor]) -> dict[str, tuple[int, int]]:
    """Map the linear layers inside a model's blocks to (out_features, in_features)."""
    return {
        name.removesuffix(".weight"): (tensor.shape[0], tensor.shape[1])
        for name, tensor in tensors.items()
        if name.endswith(".weight") and len(tensor.shape) == 2 and _BLOCK.search(name)
    }


def slug(name: str) -> str:
    """Reduce a name to lower-case letters, digits, dots and single hyphens."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.") or "model"


def _require_model(directory: Path) -> Listing:
    if not directory.is_dir():
        raise RecipeError(f"{directory}: no such model directory")
    listing = Listing(frozenset(path.name for path in directory.iterdir()), _adapter_base(directory))
    problem = missing_model(listing)
    if problem:
        raise RecipeError(f"{directory}: {problem}")
    return listing


def _adapter_base(directory: Path) -> str | None:
    try:
        base = json.loads((directory / "adapter_config.json").read_bytes())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return base if isinstance(base, str) else None


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    encoded = path.read_bytes()
    if encoded.startswith(_BYTE_ORDER_MARK):
        raise RecipeError(
            f"{path}: begins with a byte order mark, which transformers and vLLM refuse; save it as plain UTF-8"
        )
    try:
        config = json.loads(encoded)
    except ValueError as error:
        raise RecipeError(f"{path}: not JSON ({error}); copy the model again") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise RecipeError(f"{path}: not a transformers model: it names no model_type")
    return config


def _require_unquantized(
    directory: Path,
    listing: Listing,
    config: Mapping[str, Any],
    index: Mapping[str, str] | None,
    tensors: Mapping[str, StoredTensor],
) -> None:
    indexed = None if index is None else frozenset(index.values())
    problem = (
        ambiguous_weights(listing, indexed)
        or adapter_conflict(listing, peft_installed=find_spec("peft") is not None)
        or quantization_problem(config, frozenset(tensor.dtype for tensor in tensors.values()))
    )
    if problem:
        raise RecipeError(f"{directory}: {problem}")


def _dtype_of(config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> str:
    """Tell a model's dtype from its config; from most of its weights where the config doesn't say."""
    for settings in (config, text_config(config)):
        name = settings.get("dtype") or settings.get("torch_dtype")
        if isinstance(name, str):
            return _DTYPES.get(name, name)
    sizes: dict[str, int] = {}
    for tensor in tensors.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.bytes
    largest = max(sizes, key=lambda dtype: sizes[dtype], default="F32")
    return _STORED_DTYPES.get(largest, "fp32")
