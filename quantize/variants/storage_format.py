"""How linear layers are stored, as a configuration tells it, as a scheme wants it, and in which tensors."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from config.manifest import Scheme
from quantize.schemes.module_config import FUSED, weight_args_of

Kind = Literal["gptq", "int-quantized", "pack-quantized"]
Part = tuple[tuple[str, ...], tuple[int, ...]]  # the dtypes it may have, its shape

_WORD_BITS = 32
_FLOATS = ("F16", "BF16", "F32")
MARKERS: Mapping[Kind, str] = MappingProxyType(
    {"gptq": "qweight", "int-quantized": "weight_scale", "pack-quantized": "weight_packed"},
)


@dataclass(frozen=True, slots=True)
class StorageFormat:
    """How one layer is stored; group size -1 is one group per output."""

    kind: Kind
    bits: int
    group_size: int
    sym: bool = True

    def __str__(self) -> str:
        """Say it in a word, for messages."""
        return f"int{self.bits} in {'channels' if self.group_size == -1 else f'groups of {self.group_size}'}"


def kind_of(config: Mapping[str, Any]) -> Kind | None:
    """Tell how a quantization_config's layers are stored, or None if this package can't read them."""
    method = str(config.get("quant_method", "")).lower()
    if method == "gptq":
        return "gptq"
    stored = config.get("format")
    if method == "compressed-tensors" and stored in ("int-quantized", "pack-quantized"):
        return "int-quantized" if stored == "int-quantized" else "pack-quantized"
    return None


def configured_format(config: Mapping[str, Any], layer: str) -> StorageFormat | None:
    """Tell how a quantization_config says that a layer is stored, or None if it is left alone.

    GPTQ: the first pattern of `dynamic` that matches from the name's start counts, as in GPTQModel and vLLM.
    """
    kind = kind_of(config)
    if kind == "gptq":
        return _gptq_format(config, layer)
    if kind is None or any(_is_target(layer, target) for target in config.get("ignore") or ()):
        return None
    groups = list((config.get("config_groups") or {}).values())
    named = [group for group in groups if any(_is_target(layer, target) for target in group.get("targets", ()))]
    # A name goes before a class of modules, whatever the order of the groups.
    for group in (*named, *(group for group in groups if "Linear" in group.get("targets", ()))):
        weights = group["weights"]
        size = weights.get("group_size") if weights.get("strategy") == "group" else -1
        return StorageFormat(kind, weights["num_bits"], size or -1, bool(weights.get("symmetric", True)))
    return None


def scheme_format(scheme: Scheme, layer: str, kind: Kind) -> StorageFormat | None:
    """Tell how a scheme wants a layer stored, or None if it is to be left alone."""
    weight_args = weight_args_of(layer, scheme)
    return StorageFormat(kind, weight_args.bits, weight_args.group_size, scheme.sym) if weight_args else None


def parts_of(storage_format: StorageFormat, outputs: int, inputs: int) -> dict[str, Part]:
    """List the tensors that store a layer of [outputs, inputs], with dtypes and shapes."""
    bits = storage_format.bits
    groups = 1 if storage_format.group_size == -1 else -(-inputs // storage_format.group_size)
    per_word = _WORD_BITS // bits
    if storage_format.kind == "gptq":
        return {
            "qweight": (("I32",), (inputs * bits // _WORD_BITS, outputs)),
            "qzeros": (("I32",), (groups, outputs * bits // _WORD_BITS)),
            "scales": (_FLOATS, (groups, outputs)),
            "g_idx": (("I32",), (inputs,)),
        }
    if storage_format.kind == "int-quantized":
        return {"weight": (("I8",), (outputs, inputs)), "weight_scale": (_FLOATS, (outputs, 1))}
    parts: dict[str, Part] = {
        "weight_packed": (("I32",), (outputs, -(-inputs // per_word))),
        "weight_scale": (_FLOATS, (outputs, groups)),
        "weight_shape": (("I64", "I32"), (2,)),
    }
    if not storage_format.sym:
        parts["weight_zero_point"] = (("I32",), (-(-outputs // per_word), groups))
    return parts


def quantized_layers(tensors: Iterable[str], kind: Kind) -> tuple[str, ...]:
    """Name the layers of which a directory holds quantized tensors, in order."""
    marker = f".{MARKERS[kind]}"
    return tuple(sorted(name.removesuffix(marker) for name in tensors if name.endswith(marker)))


def fused_layers(layers: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Map the fused names that vLLM makes of a model's linear layers to their members."""
    known = set(layers)
    fused: dict[str, tuple[str, ...]] = {}
    for name, members in FUSED.items():
        for layer in sorted(known):
            if layer.endswith(f".{members[0]}"):
                stem = layer.removesuffix(members[0])
                found = tuple(stem + member for member in members if stem + member in known)
                if len(found) > 1:
                    fused[stem + name] = found
    return fused


def _gptq_format(config: Mapping[str, Any], layer: str) -> StorageFormat | None:
    bits, size, sym = config.get("bits", 0), config.get("group_size", 0), config.get("sym", True)
    for pattern, changes in (config.get("dynamic") or {}).items():
        if not re.match(pattern[2:] if pattern[:2] in ("+:", "-:") else pattern, layer):
            continue
        if pattern.startswith("-:"):
            return None
        bits, size, sym = changes.get("bits", bits), changes.get("group_size", size), changes.get("sym", sym)
        break
    return StorageFormat("gptq", bits, size, bool(sym))


def _is_target(layer: str, target: str) -> bool:
    """Match as compressed-tensors does: by a regular expression after `re:`, or by the whole name."""
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), layer) is not None
    return layer == target
