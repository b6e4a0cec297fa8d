"""Bits per weight of a model directory: bytes of its tensors over the parameters of the base."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from quantize.model_files.weight_files import stored_tensors

_LAYER = re.compile(r"(^|\.)(layers|h|blocks)\.\d+\.")
_STORED_BYTES = "stored_bytes.json"


@dataclass(frozen=True, slots=True)
class Bits:
    """Bits for each parameter of the base: of the decoder layers, and of everything."""

    layers: float
    file: float


def bits_per_weight(directory: Path, base: Path) -> Bits:
    """Compute both; dense directories name the bytes that their tensors stand for in a file of their own."""
    parameters = {name: prod(tensor.shape) for name, tensor in stored_tensors(base).items()}
    stored = stored_bytes(directory)
    return Bits(8 * _inside(stored) / _inside(parameters), 8 * sum(stored.values()) / sum(parameters.values()))


def stored_bytes(directory: Path) -> dict[str, int]:
    """Give the bytes of each tensor."""
    told = directory / _STORED_BYTES
    if told.is_file():
        return {str(name): int(size) for name, size in json.loads(told.read_bytes()).items()}
    return {name: tensor.bytes for name, tensor in stored_tensors(directory).items()}


def _inside(sizes: Mapping[str, int]) -> int:
    return sum(size for name, size in sizes.items() if _LAYER.search(name))
