"""Schemes are data: named presets, which engines load them, and which models they fit."""

from collections.abc import Mapping
from difflib import get_close_matches
from types import MappingProxyType

from config.manifest import Engine, Scheme
from quantize.errors import RecipeError


def _gptq(name: str, bits: int, group_size: int) -> Scheme:
    return Scheme(
        name=name,
        bits=bits,
        group_size=group_size,
        sym=True,
        desc_act=False,
        activation_bits=16,
        format="gptq",
    )


_W8A8 = Scheme(
    name="w8a8",
    bits=8,
    group_size=-1,
    sym=True,
    desc_act=False,
    activation_bits=8,
    format="compressed-tensors",
)

PRESETS: Mapping[str, Scheme] = MappingProxyType(
    {
        scheme.name: scheme
        for scheme in (
            _gptq("w4a16-g128", 4, 128),
            _gptq("w4a16-g64", 4, 64),
            _gptq("w4a16-g32", 4, 32),
            _gptq("w8a16-g128", 8, 128),
            _gptq("w8a16-channel", 8, -1),
            _W8A8,
        )
    },
)

# The kernels that vLLM 0.32 has for these formats want both sides of a matrix in multiples of this.
KERNEL_TILE = 32


def preset(name: str) -> Scheme:
    """Look a scheme up by name; RecipeError proposes the nearest name."""
    if name in PRESETS:
        return PRESETS[name]
    near = get_close_matches(name, PRESETS, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}? " if near else ""
    raise RecipeError(f"unknown scheme {name!r}; {hint}(one of: {', '.join(PRESETS)})")


def refusals(scheme: Scheme) -> dict[Engine, str]:
    """Tell which engines can't load a scheme, and why; an engine that is not named loads it."""
    if scheme.format == "gptq" and scheme.bits == 8:
        return {"cpu": "vLLM has no CPU kernel for 8-bit GPTQ; use w8a8, or --engine cuda for another machine"}
    return {}


def require_engine(scheme: Scheme, engine: Engine) -> None:
    """Raise RecipeError where `engine` can't load `scheme`."""
    reason = refusals(scheme).get(engine)
    if reason:
        raise RecipeError(f"scheme {scheme.name} doesn't load on engine {engine}: {reason}")


def misfit(scheme: Scheme, shapes: Mapping[str, tuple[int, int]], sizes: Mapping[str, int]) -> str | None:
    """Say why a model's linear layers don't fit a scheme, or None.

    `shapes` maps a linear layer's name to (out_features, in_features); `sizes` names well-known dimensions
    (`hidden size` -> 576) so that the message can use the reader's word for a number.
    """
    words = {size: word for word, size in sizes.items()}
    step = scheme.group_size if scheme.group_size > 0 else KERNEL_TILE
    for name, (rows, columns) in shapes.items():
        if columns % step:
            subject = words.get(columns, f"the input of {name},")
            return f"{subject} {columns} is not divisible by {step}; {_advice(scheme, shapes)}"
        if rows % KERNEL_TILE:
            return f"the output of {name}, {rows}, is not divisible by {KERNEL_TILE}; vLLM has no kernel for it"
    return None


def _advice(scheme: Scheme, shapes: Mapping[str, tuple[int, int]]) -> str:
    fitting = [other.name for other in PRESETS.values() if other.bits == scheme.bits and _fits(other, shapes)]
    return f"use {fitting[0]}" if fitting else "no preset of these bits fits this model"


def _fits(scheme: Scheme, shapes: Mapping[str, tuple[int, int]]) -> bool:
    step = scheme.group_size if scheme.group_size > 0 else KERNEL_TILE
    return all(columns % step == 0 for _, columns in shapes.values())
