"""Solved modules -> the tensors of the checkpoint by name, read and packed one module at a time.

Format 1 of GPTQ, as `quantize.variants.weights` describes it.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from quantize.variants.bit_packing import pack_columns, pack_rows
from quantize.variants.weights import LazyTensor, lazy_tensors

# The folder of a solver that packs by itself.
PACKED = "packed"
_PARTS = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(slots=True)
class _PackedModules:
    """Packs the modules of a folder; the last one is kept, since its four parts are asked for in turn."""

    folder: Path
    bits: Mapping[str, int]
    on_module: Callable[[str], None]
    last: tuple[str, dict[str, Any]] = field(default=("", {}))

    def part(self, module: str, part: str) -> Any:
        """Return one tensor of a module."""
        if self.last[0] != module:
            self.last = (module, _read_packed(self.folder / f"{module}.safetensors", self.bits[module]))
            self.on_module(module)
        return self.last[1][part]


def packed_tensors(
    solved: Path, bits: Mapping[str, int], on_module: Callable[[str], None] = lambda _: None
) -> dict[str, LazyTensor]:
    """Map the names of all GPTQ tensors to readers; `bits` has those of every module, `on_module` hears its name."""
    if (solved / PACKED).is_dir():
        return lazy_tensors(solved / PACKED)
    modules = _PackedModules(solved, bits, on_module)
    return {
        f"{module}.{part}": LazyTensor(partial(modules.part, module, part))
        for module in sorted(bits)
        for part in _PARTS
    }


def rounded_tensors(solved: Path, modules: Iterable[str], on_module: Callable[[str], None]) -> dict[str, LazyTensor]:
    """Map `<module>.weight` [N, K] and `<module>.scale` to readers, as `quantize.backends.fp8_child` wrote them."""

    def read(module: str, part: str) -> Any:
        from safetensors import safe_open  # noqa: PLC0415

        if part == "weight":
            on_module(module)
        with safe_open(solved / f"{module}.safetensors", framework="pt") as file:
            return file.get_tensor(part)

    return {
        f"{module}.{part}": LazyTensor(partial(read, module, part))
        for module in sorted(modules)
        for part in ("weight", "scale")
    }


def pack(integers: Any, scale: Any, zero: Any, g_idx: Any, bits: int) -> dict[str, Any]:
    """Pack a module: integers [N, K], scale and zero [N, G], g_idx [K].

    A zero point of 0, which only asymmetric weights have, is stored as 2^bits - 1: readers add one and drop the carry.
    """
    import torch  # noqa: PLC0415

    return {
        "qweight": pack_rows(integers.t().to(torch.int32), bits).contiguous(),
        "qzeros": pack_columns((zero.round().to(torch.int32) - 1).t() & ((1 << bits) - 1), bits).contiguous(),
        "scales": scale.t().to(torch.float16).contiguous(),
        "g_idx": g_idx.to(torch.int32).contiguous(),
    }


def _read_packed(path: Path, bits: int) -> dict[str, Any]:
    from safetensors import safe_open  # noqa: PLC0415

    with safe_open(path, framework="pt") as file:
        integers, scale, zero, g_idx = map(file.get_tensor, ("integers", "scale", "zero", "g_idx"))
    return pack(integers, scale, zero, g_idx, bits)
