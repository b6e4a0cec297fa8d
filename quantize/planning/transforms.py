"""Transforms of the base before it is solved: their names, the default, and why a base is refused. Pure; no torch."""

from dataclasses import replace
from math import prod
from typing import Literal, get_args

from config.manifest import Scheme
from quantize.base import BaseModel
from quantize.errors import RecipeError
from quantize.module_tree import is_plain
from quantize.planning.block_form import BLOCK_FORMS
from quantize.schemes.makers import is_data_free

TransformName = Literal["rotate-r1", "rotate-r2", "smooth"]
# In the order in which they are applied: scales are searched on the activations of the rotated model.
TRANSFORMS: tuple[TransformName, ...] = get_args(TransformName)
# The flag's word for an empty list.
NO_TRANSFORM = "none"
# Blocks of two RMSNorms, each before the linear layers that read it, whose weights multiply; nothing between the last
# linear layer of attention or MLP and the sum but a constant factor.
ROTATED_FAMILIES = frozenset(
    {
        "ernie4_5",
        "granite",
        "hunyuan_v1_dense",
        "llama",
        "ministral3",
        "mistral",
        "qwen2",
        "qwen3",
        "seed_oss",
        "smollm3",
    }
)
_FP32_BYTES = 4


def in_order(names: tuple[TransformName, ...]) -> tuple[TransformName, ...]:
    """Return transforms in the order in which they are applied, each once."""
    return tuple(name for name in TRANSFORMS if name in names)


def settled_transforms(
    names: tuple[TransformName, ...] | None, base: BaseModel, scheme: Scheme
) -> tuple[TransformName, ...]:
    """Choose what is done where nothing was named (None): scales, which activations of 8 bits need, where they can be.

    Not in a base with experts: only its attention would gain, and all of it is written once more.
    """
    if names is not None:
        return names
    return ("smooth",) if rounds_activations(scheme) and not unsmoothed_reason(base) else ()


def rounds_activations(scheme: Scheme) -> bool:
    """Tell whether a scheme that is solved rounds inputs of layers, too."""
    return scheme.activation_bits == 8 and not is_data_free(scheme)


def unsmoothed_reason(base: BaseModel) -> str:
    """Say why a base is solved without scales if none were asked for; empty where it has them."""
    family = base.config.get("model_type")
    if family not in BLOCK_FORMS:
        return f"transforms of {family} are not supported"
    return "the model has experts" if base.modules.has_experts else ""


def require_transformable(base: BaseModel, scheme: Scheme | None, names: tuple[TransformName, ...]) -> None:
    """Raise RecipeError where a transform would change what the base computes, or where nothing would come of it."""
    if not names:
        return
    if scheme is not None and is_data_free(scheme):
        raise RecipeError(f"{scheme.name} rounds without calibration data and takes no transforms; remove --transform")
    family = base.config.get("model_type")
    if set(names) - {"smooth"} and (family not in ROTATED_FAMILIES or not is_plain(base)):
        raise RecipeError(
            f"{base.directory}: rotations of {family} are not supported: they need RMSNorms right before the linear "
            f"layers, and no experts or joined matrices ({', '.join(sorted(ROTATED_FAMILIES))}); use --transform smooth"
        )
    if family not in BLOCK_FORMS:
        raise RecipeError(
            f"{base.directory}: transforms of {family} are not supported ({', '.join(BLOCK_FORMS)}); "
            "use --transform none"
        )


def planned_base(base: BaseModel, names: tuple[TransformName, ...]) -> BaseModel:
    """Give a base the tensors that its variant will have: R1 makes an output matrix out of tied embeddings."""
    embeddings = base.tensors.get("model.embed_tokens.weight")
    if "rotate-r1" not in names or embeddings is None:
        return base
    return replace(base, tensors={**base.tensors, "lm_head.weight": embeddings})


def transform_bytes(base: BaseModel, names: tuple[TransformName, ...]) -> int:
    """Bytes on the disk of the stages while a base is transformed, in fp32: twice where scales follow a rotation."""
    steps = ("smooth" in names) + (len(set(names) - {"smooth"}) > 0)
    tensors = planned_base(base, names).tensors.values()
    return steps * _FP32_BYTES * sum(prod(tensor.shape) for tensor in tensors)
