"""A quantized model directory as plain values: its configuration and its tensors' headers, read without torch."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.errors import VariantError

_LENGTH_BYTES = 8
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class TensorLocation:
    """Where a tensor lies: bytes `start` to `stop` of a safetensors file; `dtype` in safetensors' words."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    def read(self) -> bytes:
        """Read the tensor's bytes."""
        with self.file.open("rb") as stream:
            stream.seek(self.start)
            return stream.read(self.stop - self.start)


@dataclass(frozen=True, slots=True)
class Artefact:
    """A quantized directory; `told` is its quantization_config, `index` maps tensors to files if it has one."""

    directory: Path
    config: Mapping[str, Any]
    quantization_config: Mapping[str, Any]
    index: Mapping[str, str] | None
    entries: Mapping[str, TensorLocation]
    duplicates: tuple[str, ...] = ()

    @property
    def weight_bytes(self) -> int:
        """Size of all tensors together."""
        return sum(entry.stop - entry.start for entry in self.entries.values())


def read_artefact(directory: Path) -> Artefact:
    """Read a directory's configuration and headers; VariantError if it isn't a quantized model."""
    config = read_object(directory / "config.json")
    quantization_config = config.get("quantization_config")
    if not isinstance(quantization_config, dict):
        raise VariantError(f"{directory}: its config.json has no quantization_config; is it quantized?")
    index_file = directory / _INDEX
    index = read_object(index_file).get("weight_map", {}) if index_file.is_file() else None
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise VariantError(f"{directory}: has no *.safetensors weights; save it as safetensors first")
    every = [(name, entry) for file in files for name, entry in _entries(file)]
    entries = dict(every)
    names = [name for name, _ in every]
    duplicates = tuple(sorted({name for name in names if names.count(name) > 1})) if len(entries) < len(every) else ()
    return Artefact(directory, config, quantization_config, index, entries, duplicates)


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object; VariantError if the file isn't one."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise VariantError(f"{path}: no such file; is it a model directory?") from None
    except ValueError as error:
        raise VariantError(f"{path}: not JSON ({error}); make or copy the variant again") from None
    if not isinstance(value, dict):
        raise VariantError(f"{path}: not a JSON object; make or copy the variant again")
    return value


def _entries(file: Path) -> Iterator[tuple[str, TensorLocation]]:
    damaged = VariantError(f"{file}: its safetensors header is damaged; make or copy the variant again")
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
        if not 2 <= length <= size:
            raise damaged
        try:
            header = json.loads(stream.read(length))
        except ValueError:
            raise damaged from None
    begin = _LENGTH_BYTES + length
    for name, fields in header.items():
        if name == "__metadata__":
            continue
        start, stop = fields["data_offsets"]
        if begin + stop > size:
            raise VariantError(f"{file}: is cut off: {name} ends beyond it; make or copy the variant again")
        yield name, TensorLocation(file, fields["dtype"], tuple(fields["shape"]), begin + start, begin + stop)
