"""Transforms of the base before it is solved: their names, and why a base is refused. Pure; no torch."""

from dataclasses import replace
from math import prod
from typing import Literal, get_args

from config.manifest import Scheme
from quantize.base import BaseModel
from quantize.errors import RecipeError
from quantize.module_tree import is_plain
from quantize.schemes.makers import is_data_free

TransformName = Literal["rotate-r1", "rotate-r2", "smooth"]
# In the order in which they are applied: scales are searched on the activations of the rotated model.
TRANSFORMS: tuple[TransformName, ...] = get_args(TransformName)
# Blocks of two RMSNorms, each before the linear layers that read it, whose weights multiply; nothing between the last
# linear layer of attention or MLP and the sum but a constant factor.
FAMILIES = frozenset(
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


def require_transformable(base: BaseModel, scheme: Scheme | None, names: tuple[TransformName, ...]) -> None:
    """Raise RecipeError where a transform would change what the base computes, or where nothing would come of it."""
    if not names:
        return
    if scheme is not None and is_data_free(scheme):
        raise RecipeError(f"{scheme.name} rounds without calibration data and takes no transforms; remove --transform")
    family = base.config.get("model_type")
    if family not in FAMILIES or not is_plain(base):
        raise RecipeError(
            f"{base.directory}: transforms of {family} are not supported: they need RMSNorms right before the linear "
            f"layers, and no experts or joined matrices ({', '.join(sorted(FAMILIES))}); remove --transform"
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
