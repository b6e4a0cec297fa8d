"""How linear layers are stored: as a configuration says, as a scheme wants it, and in which tensors."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any, Literal

from config.manifest import Scheme
from config.quantization import COMPRESSED_TENSORS, Compression, QuantizationArgs, parse_args, schemes_of
from quantize.schemes.module_config import FUSED, is_symmetric, weight_args_of

Kind = Compression
Part = tuple[tuple[str, ...], tuple[int, ...]]  # the dtypes it may have, its shape
Parts = dict[str, Part]

_WORD_BITS = 32
_FLOATS = ("F16", "BF16", "F32")
_FP8 = ("F8_E4M3",)
_BYTES = ("U8",)
_NO_SHAPE: tuple[int, ...] = ()
# A tensor of each quantized layer that other layers don't have; `<layer>_blocks` holds all experts of a block.
MARKERS: Mapping[Kind, tuple[str, ...]] = MappingProxyType(
    {
        "gptq": (".qweight",),
        "awq": (".qweight",),
        "int-quantized": (".weight_scale",),
        "float-quantized": (".weight_scale",),
        "naive-quantized": (".weight_scale",),
        "pack-quantized": (".weight_packed",),
        "nvfp4-pack-quantized": (".weight_packed",),
        "mxfp4-pack-quantized": (".weight_packed",),
        "fp8": (".weight_scale_inv", ".weight_scale"),
        "modelopt": (".weight_scale",),
        "bitsandbytes": (".weight.absmax", ".SCB"),
        "mxfp4": ("_blocks",),
    },
)
# Formats that `quantize.variants.weights` reads as dense weights.
_READ_BACK: frozenset[Kind] = frozenset({"gptq", "int-quantized", "pack-quantized", "float-quantized", "fp8"})
# Keys of module names that a method leaves alone.
_SKIPPED = ("modules_to_not_convert", "ignored_layers", "llm_int8_skip_modules", "exclude_modules", "ignore")


@dataclass(frozen=True, slots=True)
class StorageFormat:
    """How one layer is stored; group size -1 is one group per output, `block` rows and columns with a common scale."""

    kind: Kind
    bits: int
    group_size: int
    sym: bool = True
    type: Literal["int", "float"] = "int"
    block: tuple[int, int] | None = None
    per_tensor: bool = False

    def __str__(self) -> str:
        """Say it in a word, for messages."""
        if self.block is not None:
            extent = f"blocks of {self.block[0]}x{self.block[1]}"
        elif self.per_tensor:
            extent = "one tensor"
        else:
            extent = "channels" if self.group_size == -1 else f"groups of {self.group_size}"
        return f"{'int' if self.type == 'int' else 'fp'}{self.bits} in {extent}"

    @classmethod
    def of(cls, kind: Kind, weights: QuantizationArgs) -> "StorageFormat":
        """Translate the arguments of weights."""
        return cls(
            kind,
            weights.num_bits,
            weights.columns,
            weights.symmetric,
            weights.type,
            weights.block_structure,
            weights.strategy == "tensor",
        )


def measurable_by(kind: Kind) -> Literal["transformers", "replica"]:
    """Tell what measures a variant: transformers, where this package reads its weights back, else a running replica."""
    return "transformers" if kind in _READ_BACK else "replica"


def kind_of(config: Mapping[str, Any]) -> Kind | None:
    """Tell how a quantization_config's layers are stored, or None if this package can't read them."""
    if str(config.get("quant_method", "")).lower() == "gptq":
        return "gptq"
    schemes = schemes_of(config)
    return schemes[0].compression if schemes else None


def configured_format(config: Mapping[str, Any], layer: str) -> StorageFormat | None:
    """Tell how a quantization_config says that a layer is stored, or None if it is left alone.

    GPTQ: the first pattern of `dynamic` that matches from the name's start counts, as in GPTQModel and vLLM.
    """
    kind = kind_of(config)
    if kind == "gptq":
        return _gptq_format(config, layer)
    if kind is not None and kind in COMPRESSED_TENSORS:
        return _compressed_format(config, layer, kind)
    if kind is None or _is_skipped(config, layer):
        return None
    return StorageFormat.of(kind, schemes_of(config)[0].weights)


def scheme_format(scheme: Scheme, layer: str, kind: Kind) -> StorageFormat | None:
    """Tell how a scheme wants a layer stored, or None if it is to be left alone."""
    args = weight_args_of(layer, scheme)
    if args is None:
        return None
    if (args.bits, args.group_size) == (scheme.bits, scheme.group_size):
        return StorageFormat.of(kind, scheme.weights)
    return StorageFormat(kind, args.bits, args.group_size, is_symmetric(scheme, args.bits), scheme.weights.type)


def parts_of(storage_format: StorageFormat, outputs: int, inputs: int) -> Parts:
    """List the tensors that store a layer of [outputs, inputs], with dtypes and shapes; () fits a vector of one."""
    read = _PARTS.get(storage_format.kind)
    return read(storage_format, outputs, inputs) if read else {}


def quantized_layers(tensors: Iterable[str], kind: Kind) -> tuple[str, ...]:
    """Name the layers of which a directory holds quantized tensors, in order."""
    return tuple(
        sorted({name.removesuffix(marker) for name in tensors for marker in MARKERS[kind] if name.endswith(marker)})
    )


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


def _compressed_format(config: Mapping[str, Any], layer: str, kind: Kind) -> StorageFormat | None:
    if any(_is_target(layer, target) for target in config.get("ignore") or ()):
        return None
    groups = list((config.get("config_groups") or {}).values())
    named = [group for group in groups if any(_is_target(layer, target) for target in group.get("targets", ()))]
    # A name goes before a class of modules, whatever the order of the groups.
    for group in (*named, *(group for group in groups if "Linear" in group.get("targets", ()))):
        stored = group.get("format") or config.get("format") or kind
        return StorageFormat.of(stored, parse_args(group["weights"]))
    return None


def _is_target(layer: str, target: str) -> bool:
    """Match as compressed-tensors does: by a regular expression after `re:`, or by the whole name."""
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), layer) is not None
    return layer == target


def _is_skipped(config: Mapping[str, Any], layer: str) -> bool:
    """Match as transformers does: a whole name, the name of a parent or of a part, or ModelOpt's shell pattern."""
    names = [name for key in _SKIPPED for name in config.get(key) or ()]
    parts = f".{layer}."
    return any(f".{name}." in parts or ("*" in name and fnmatchcase(layer, name)) for name in names)


def _gptq_parts(form: StorageFormat, outputs: int, inputs: int) -> Parts:
    groups = _groups(form, inputs)
    return {
        "qweight": (("I32",), (inputs * form.bits // _WORD_BITS, outputs)),
        "qzeros": (("I32",), (groups, outputs * form.bits // _WORD_BITS)),
        "scales": (_FLOATS, (groups, outputs)),
        "g_idx": (("I32",), (inputs,)),
    }


def _awq_parts(form: StorageFormat, outputs: int, inputs: int) -> Parts:
    groups, words = _groups(form, inputs), outputs * form.bits // _WORD_BITS
    return {
        "qweight": (("I32",), (inputs, words)),
        "qzeros": (("I32",), (groups, words)),
        "scales": (_FLOATS, (groups, outputs)),
    }


def _pack_parts(form: StorageFormat, outputs: int, inputs: int) -> Parts:
    groups, per_word = _groups(form, inputs), _WORD_BITS // form.bits
    parts: Parts = {
        "weight_packed": (("I32",), (outputs, -(-inputs // per_word))),
        "weight_scale": (_FLOATS, (outputs, groups)),
        "weight_shape": (("I64", "I32"), (2,)),
    }
    return parts if form.sym else {**parts, "weight_zero_point": (("I32",), (-(-outputs // per_word), groups))}


def _whole_parts(form: StorageFormat, outputs: int, inputs: int) -> Parts:
    """Return the parts of a matrix of bytes with its scales."""
    scale = "weight_scale_inv" if form.kind == "fp8" and form.block else "weight_scale"
    return {
        "weight": (("I8",) if form.type == "int" else _FP8, (outputs, inputs)),
        scale: (_FLOATS, _scale_shape(form, outputs, inputs)),
    }


def _scale_shape(form: StorageFormat, outputs: int, inputs: int) -> tuple[int, ...]:
    if form.block is not None:
        return (-(-outputs // form.block[0]), -(-inputs // form.block[1]))
    return _NO_SHAPE if form.per_tensor else (outputs, 1)


def _nvfp4_parts(form: StorageFormat, outputs: int, inputs: int) -> Parts:
    return {
        "weight_packed": (_BYTES, (outputs, inputs // 2)),
        "weight_scale": (_FP8, (outputs, inputs // form.group_size)),
        "weight_global_scale": (_FLOATS, _NO_SHAPE),
    }


def _mxfp4_parts(form: StorageFormat, outputs: int, inputs: int) -> Parts:
    return {
        "weight_packed": (_BYTES, (outputs, inputs // 2)),
        "weight_scale": (("U8", "F8_E8M0"), (outputs, inputs // form.group_size)),
    }


def _modelopt_parts(form: StorageFormat, outputs: int, inputs: int) -> Parts:
    if form.bits == 4:
        return {
            "weight": (_BYTES, (outputs, inputs // 2)),
            "weight_scale": (_FP8, (outputs, inputs // form.group_size)),
            "weight_scale_2": (_FLOATS, _NO_SHAPE),
        }
    return _whole_parts(form, outputs, inputs)


def _bitsandbytes_parts(form: StorageFormat, outputs: int, inputs: int) -> Parts:
    if form.bits == 4:
        return {
            "weight": (_BYTES, (outputs * inputs // 2, 1)),
            "weight.absmax": ((*_FLOATS, "U8"), (-(-outputs * inputs // form.group_size),)),
        }
    return {"weight": (("I8",), (outputs, inputs)), "SCB": (_FLOATS, (outputs,))}


def _groups(form: StorageFormat, inputs: int) -> int:
    return 1 if form.group_size == -1 else -(-inputs // form.group_size)


_PARTS: Mapping[Kind, Callable[[StorageFormat, int, int], Parts]] = MappingProxyType(
    {
        "gptq": _gptq_parts,
        "awq": _awq_parts,
        "pack-quantized": _pack_parts,
        "int-quantized": _whole_parts,
        "float-quantized": _whole_parts,
        "naive-quantized": _whole_parts,
        "fp8": _whole_parts,
        "nvfp4-pack-quantized": _nvfp4_parts,
        "mxfp4-pack-quantized": _mxfp4_parts,
        "modelopt": _modelopt_parts,
        "bitsandbytes": _bitsandbytes_parts,
    }
)
