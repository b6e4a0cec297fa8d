"""Copies of a sealed int4 variant: alike, or damaged behind a manifest that says nothing of it."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from config.manifest import FILE_NAME, Manifest
from quantize.running.files import link_or_copy
from quantize.variants.store import seal

WEIGHTS = "model.safetensors"
_LENGTH_BYTES = 8
# Codes of 4 bits, eight in a word: the lowest bit of each.
_LOWEST_BITS = 0x11111111

Change = Callable[["np.ndarray[Any, Any]"], "np.ndarray[Any, Any]"]


def copy_variant(
    source: Path, target: Path, changes: dict[str, Change] | None = None, left_out: Sequence[str] = ()
) -> None:
    """Copy and seal a variant under an id of its own; `changes` are by the end of a tensor's name.

    The manifest keeps the quality that was measured of the source. Files that are `left_out` are not copied.
    """
    target.mkdir(parents=True)
    for file in source.iterdir():
        if file.name not in (FILE_NAME, WEIGHTS, *left_out):
            link_or_copy(file, target / file.name)
    if changes:
        (target / WEIGHTS).write_bytes((source / WEIGHTS).read_bytes())
        _change(target / WEIGHTS, changes)
    else:
        link_or_copy(source / WEIGHTS, target / WEIGHTS)
    manifest = Manifest.read(source).model_dump(exclude={"files", "created"})
    seal(target, manifest | {"id": f"{manifest['id']}-{target.name}"})


def doubled_scales(layer: int) -> dict[str, Change]:
    """Double every scale of a layer."""
    return {f"layers.{layer}.{module}.scales": lambda scales: scales * 2 for module in _MODULES}


def flipped_codes(layers: Sequence[int], module: str) -> dict[str, Change]:
    """Flip the lowest bit of every weight of a module: each is off by one step, nothing is slower or fails."""
    return {f"layers.{layer}.{module}.qweight": lambda codes: codes ^ _LOWEST_BITS for layer in layers}


_MODULES = (
    *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
_TYPES = {"F16": np.float16, "I32": np.int32}


def _change(path: Path, changes: dict[str, Change]) -> None:
    """Change tensors of a safetensors file in place; KeyError if one of them is not there."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        header = json.loads(file.read(length))
        for end, change in changes.items():
            name = next((each for each in header if each.endswith(end)), end)
            first, last = header[name]["data_offsets"]
            file.seek(_LENGTH_BYTES + length + first)
            kind = _TYPES[header[name]["dtype"]]
            tensor = np.frombuffer(file.read(last - first), kind)
            file.seek(_LENGTH_BYTES + length + first)
            file.write(change(tensor).astype(kind).tobytes())
