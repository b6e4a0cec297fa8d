"""A quantized model directory as plain values: its configuration and its tensors' headers, read without torch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.errors import VariantError, WeightFileError
from quantize.model_files.safetensors_header import StoredTensor, read_header
from quantize.model_files.weight_files import INDEX_FILE


@dataclass(frozen=True, slots=True)
class Artefact:
    """A quantized directory; `told` is its quantization_config, `index` maps tensors to files if it has one."""

    directory: Path
    config: Mapping[str, Any]
    quantization_config: Mapping[str, Any]
    index: Mapping[str, str] | None
    entries: Mapping[str, StoredTensor]
    duplicates: tuple[str, ...] = ()

    @property
    def weight_bytes(self) -> int:
        """Size of all tensors together."""
        return sum(entry.bytes for entry in self.entries.values())


def read_artefact(directory: Path) -> Artefact:
    """Read a directory's configuration and headers; VariantError if it isn't a quantized model."""
    config = read_object(directory / "config.json")
    quantization_config = config.get("quantization_config")
    if not isinstance(quantization_config, dict):
        raise VariantError(f"{directory}: its config.json has no quantization_config; is it quantized?")
    index_file = directory / INDEX_FILE
    index = read_object(index_file).get("weight_map", {}) if index_file.is_file() else None
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise VariantError(f"{directory}: has no *.safetensors weights; save it as safetensors first")
    try:
        every = [item for file in files for item in read_header(file).items()]
    except WeightFileError as error:
        raise VariantError(f"{error}; make or copy the variant again") from None
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
