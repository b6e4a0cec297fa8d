"""The header of a safetensors file: what it stores, and where. No tensor is read.

Format (https://huggingface.co/docs/safetensors): the length of the header in 8 little-endian bytes, the header as JSON
({name: {dtype, shape, data_offsets: [first, end)}}, offsets counted from the end of the header), then the data.
"""

import builtins
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.errors import WeightFileError

_LENGTH_BYTES = 8


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a safetensors file: `bytes` bytes from `start`; `dtype` is safetensors' name (BF16, I32, ...)."""

    shape: tuple[int, ...]
    bytes: int
    dtype: str = "BF16"
    file: Path = Path()
    start: int = 0

    def read(self) -> builtins.bytes:
        """Read the tensor's data."""
        with self.file.open("rb") as stream:
            stream.seek(self.start)
            return stream.read(self.bytes)


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Read the header of a safetensors file: {tensor name: tensor}.

    WeightFileError if the file is not safetensors, or shorter or longer than its header says.
    """
    file_bytes = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
        data_start = _LENGTH_BYTES + length
        if not 2 <= length <= file_bytes - _LENGTH_BYTES:
            raise WeightFileError(f"{file}: not a safetensors file, or truncated ({file_bytes} bytes)")
        header = _parse(file, stream.read(length))
    tensors = {name: _tensor(file, name, entry, data_start) for name, entry in header.items() if name != "__metadata__"}
    end = max((tensor.start + tensor.bytes for tensor in tensors.values()), default=data_start)
    if file_bytes < end:
        raise WeightFileError(f"{file}: truncated: {file_bytes} bytes of {end}")
    if file_bytes > end:
        raise WeightFileError(f"{file}: damaged: {file_bytes - end} bytes follow its last tensor")
    return tensors


def _parse(file: Path, encoded: bytes) -> Mapping[str, Any]:
    try:
        header = json.loads(encoded)
    except ValueError:
        header = None
    if not isinstance(header, dict):
        raise WeightFileError(f"{file}: its safetensors header is damaged")
    return header


def _tensor(file: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    try:
        first, end = entry["data_offsets"]
        return StoredTensor(tuple(entry["shape"]), end - first, entry["dtype"], file, data_start + first)
    except (KeyError, TypeError, ValueError):
        raise WeightFileError(f"{file}: its safetensors header is damaged at {name}") from None
