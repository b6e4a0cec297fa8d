"""Does a scheme fit a model? Shapes against groups, layers that vLLM fuses, tensor-parallel shares. Pure."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from config.manifest import Override, Scheme
from config.vllm import REPLICATED, ROUTERS, tile
from quantize.base import BaseModel
from quantize.errors import RecipeError
from quantize.schemes.module_config import WeightArgs, fused_name, weight_args_of
from quantize.schemes.scheme import PRESETS, named

Shapes = Mapping[str, tuple[int, int]]

# Packed words and int8 kernels need each GPU's share of the outputs in multiples of this.
_SHARE_TILE = 16
_MOST_GPUS = 16
# These take their inputs in shares; every other linear layer of a block takes its outputs in shares.
_ROW_PARALLEL = frozenset({"o_proj", "down_proj", "out_proj", "c_proj", "fc2", "w2"})


@dataclass(frozen=True, slots=True)
class Heads:
    """Attention heads of a model, which GPUs share as whole heads; 0 means unknown."""

    attention: int = 0
    key_value: int = 0


def heads_of(base: BaseModel) -> Heads:
    """Read the attention heads from a base's config."""
    config = base.config.get("text_config", base.config)
    attention = config.get("num_attention_heads")
    if not isinstance(attention, int):
        return Heads()
    key_value = config.get("num_key_value_heads")
    return Heads(attention, key_value if isinstance(key_value, int) else attention)


def misfit(scheme: Scheme, shapes: Shapes, sizes: Mapping[str, int]) -> str | None:
    """Say why a model's linear layers don't fit a scheme, or None.

    `shapes` maps a linear layer's name to (out_features, in_features); `sizes` names well-known dimensions
    (`hidden size` -> 576) so that the message can use the reader's word for a number.
    """
    words = {size: word for word, size in sizes.items()}
    for name, (rows, columns) in shapes.items():
        weight_args = weight_args_of(name, scheme)
        if weight_args is None or _leaf(name) in ROUTERS:
            continue
        step = weight_args.group_size if weight_args.group_size > 0 else tile(scheme.weights)
        if columns % step:
            subject = words.get(columns, f"the input of {name},")
            return f"{subject} {columns} is not divisible by {step}; {_advice(scheme, weight_args, shapes)}"
        if rows % tile(scheme.weights):
            return (
                f"the output of {name}, {rows}, is not divisible by {tile(scheme.weights)}; vLLM has no kernel for it"
            )
    return unevenly_fused(scheme, shapes)


def unevenly_fused(scheme: Scheme, shapes: Shapes) -> str | None:
    """Say which layers vLLM loads as one matrix although the scheme's exceptions treat them differently, or None."""
    first: dict[str, str] = {}
    for name in shapes:
        other = first.setdefault(fused_name(name), name)
        ours, theirs = weight_args_of(name, scheme), weight_args_of(other, scheme)
        if ours != theirs:
            return (
                f"vLLM loads {other} ({_told(theirs)}) and {name.rpartition('.')[2]} ({_told(ours)}) as one matrix; "
                f"give both the same bits and group size"
            )
    return None


def matching(scheme: Scheme, module: str) -> Override | None:
    """Find the exception that counts for a module: the first whose pattern matches its full name."""
    return next((override for override in scheme.overrides if fnmatchcase(module, override.modules)), None)


def fitted(scheme: Scheme, base: BaseModel) -> Scheme:
    """Drop exceptions that change nothing and name the rest; RecipeError for one that matches no module."""
    used = {matching(scheme, module) for module in base.shapes}
    for override in scheme.overrides:
        if override not in used:
            _require_harmless(override, base, scheme)
    return named(
        scheme.model_copy(update={"overrides": tuple(override for override in scheme.overrides if override in used)})
    )


def tensor_parallel_degrees(shapes: Shapes, scheme: Scheme, heads: Heads | None = None) -> tuple[int, ...]:
    """List the numbers of GPUs, up to 16, that can share every matrix of a model evenly."""
    return tuple(degree for degree in range(1, _MOST_GPUS + 1) if uneven_share(shapes, scheme, degree, heads) is None)


def uneven_share(shapes: Shapes, scheme: Scheme, degree: int, heads: Heads | None = None) -> str | None:
    """Say what `degree` GPUs can't share evenly, with module and numbers, or None."""
    if degree == 1:
        return None
    heads = heads or Heads()
    if heads.attention % degree:
        return f"{heads.attention} attention heads can't be shared by {degree} GPUs"
    if heads.key_value % degree and degree % heads.key_value:
        return f"{heads.key_value} key-value heads can't be shared by {degree} GPUs"
    for name, shape in shapes.items():
        reason = _uneven(name, shape, weight_args_of(name, scheme), degree, heads)
        if reason:
            return reason
    return None


def _uneven(name: str, shape: tuple[int, int], weight_args: WeightArgs | None, degree: int, heads: Heads) -> str | None:
    rows, columns = shape
    last = _leaf(name)
    if last in REPLICATED:
        return None
    if last in _ROW_PARALLEL:
        if weight_args and weight_args.group_size > 0 and columns % (degree * weight_args.group_size):
            return (
                f"{name}: {columns} inputs are {columns / weight_args.group_size:g} groups of "
                f"{weight_args.group_size}, "
                f"which {degree} GPUs can't share evenly"
            )
        return f"{name}: {columns} inputs can't be shared by {degree} GPUs" if columns % degree else None
    if last in ("k_proj", "v_proj") and 0 < heads.key_value < degree:
        return None  # each GPU has a copy
    # Each of the two halves is shared.
    step = degree * (_SHARE_TILE if weight_args else 1) * (2 if last == "gate_up_proj" else 1)
    return f"{name}: {rows} outputs can't be shared by {degree} GPUs" if rows % step else None


def _advice(scheme: Scheme, weight_args: WeightArgs, shapes: Shapes) -> str:
    alike = sorted(
        (other for other in PRESETS.values() if other.compression in (scheme.compression, "gptq")),
        key=lambda other: other.compression != scheme.compression,
    )
    fitting = [other.name for other in alike if other.bits == weight_args.bits and _fits(other, shapes)]
    return f"use {fitting[0]}" if fitting else "no preset of these bits fits this model"


def _fits(scheme: Scheme, shapes: Shapes) -> bool:
    step = scheme.group_size if scheme.group_size > 0 else tile(scheme.weights)
    return all(columns % step == 0 for name, (_, columns) in shapes.items() if _leaf(name) not in ROUTERS)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _told(weight_args: WeightArgs | None) -> str:
    return f"{weight_args.bits} bits, group {weight_args.group_size}" if weight_args else "kept"


def _require_harmless(override: Override, base: BaseModel, scheme: Scheme) -> None:
    if _matches(override, base.shapes):
        earlier = next(
            other.modules for other in scheme.overrides if _matches(other, base.shapes) and other != override
        )
        raise RecipeError(
            f"override {override.modules!r} never applies: earlier ones, like {earlier!r}, match its modules; "
            "put the narrower pattern first",
        )
    others = [name.removesuffix(".weight") for name in base.tensors] + ["lm_head"]
    if not _matches(override, others):
        kinds = sorted({name.rpartition(".")[2] for name in base.shapes})
        raise RecipeError(
            f"override {override.modules!r} matches no module of {base.name}; "
            f"write a shell pattern on full names, like '*.{kinds[0]}' (there are {', '.join(kinds)})",
        )
    if override.bits is not None:
        raise RecipeError(
            f"override {override.modules!r}: only linear layers inside the blocks are quantized, the rest is kept; "
            "remove it, or write keep",
        )


def _matches(override: Override, modules: Iterable[str]) -> bool:
    return any(fnmatchcase(module, override.modules) for module in modules)
