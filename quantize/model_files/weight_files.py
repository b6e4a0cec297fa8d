"""Which files of a directory hold the model's weights.

transformers 5 (`_get_resolved_checkpoint_files`) loads `model.safetensors` if there is one, else the files of
`model.safetensors.index.json`, else nothing. vLLM 0.32 (`default_loader.py`) loads the files of the index if there is
one, else every `*.safetensors`. Of a directory where the two differ, one reading is chosen here or it is refused.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from quantize.errors import WeightFileError
from quantize.model_files.safetensors_header import StoredTensor, read_header

INDEX_FILE = "model.safetensors.index.json"
WHOLE_FILE = "model.safetensors"
# Mistral's own format of the same weights, and LoRA adapters: never part of the model beside them.
_NOT_LOADED = ("consolidated", "adapter_model")


def weight_files(directory: Path) -> list[Path]:
    """List the safetensors files that hold a model's weights, sorted; without an index or `model.safetensors`, all.

    WeightFileError if the index is invalid or names a file that is missing.
    """
    index = read_index(directory)
    if index is not None:
        names = set(index.values())
        missing = sorted(name for name in names if not (directory / name).is_file())
        if missing:
            raise WeightFileError(
                f"{directory / missing[0]}: missing, and {INDEX_FILE} names it ({len(missing)} of {len(names)} files)"
            )
        return sorted(directory / name for name in names)
    whole = directory / WHOLE_FILE
    return [whole] if whole.is_file() else sorted(map(directory.joinpath, loadable(safetensors_names(directory))))


def read_index(directory: Path) -> Mapping[str, str] | None:
    """Read the index of a sharded model, {tensor name: file name}; None without one, WeightFileError if invalid."""
    path = directory / INDEX_FILE
    if not path.is_file():
        return None
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
    except (ValueError, KeyError, TypeError):
        weight_map = None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise WeightFileError(f"{path}: has no weight_map of tensors and files")
    return weight_map


def safetensors_names(directory: Path) -> list[str]:
    """List the safetensors files of a directory by name, whatever they hold."""
    return sorted(path.name for path in directory.glob("*.safetensors"))


def loadable(names: Iterable[str]) -> list[str]:
    """Leave out adapters and Mistral's consolidated files."""
    return [name for name in names if not name.startswith(_NOT_LOADED)]


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Read the headers of a model's weight files: {tensor name: tensor}; WeightFileError for a damaged file."""
    tensors: dict[str, StoredTensor] = {}
    for file in weight_files(directory):
        tensors |= read_header(file)
    return tensors
