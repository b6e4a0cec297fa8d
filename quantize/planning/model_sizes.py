"""How large the parts of a model are: what a forward pass by layers holds, and what a whole one does. Pure."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from quantize.base import BaseModel

_LAYER = re.compile(r"^(.*?\b(?:layers|h|blocks)\.)(\d+)\.")
_EXPERT = re.compile(r"\.experts\.")
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "moe_topk", "top_k_experts", "num_experts_per_token")
_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts")


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Counts of weights, and widths.

    `outer` are the weights outside the decoder layers; `layer` those of the largest layer, of which a token passes
    through `active`; `matrix` those of the largest linear layer. `widest_inputs` and `widest_outputs` belong to linear
    layers, `kv` counts the keys and values of one token in all layers.
    """

    outer: int
    layers: int
    layer: int
    active: int
    matrix: int
    hidden: int
    widest_inputs: int
    widest_outputs: int
    vocabulary: int
    kv: int

    @property
    def parameters(self) -> int:
        """All weights, with every layer as large as the largest."""
        return self.outer + self.layers * self.layer


def sizes_of(base: BaseModel) -> ModelSizes:
    """Measure a base by the headers of its files and its config."""
    config = {**base.config.get("text_config", {}), **base.config}
    layers: dict[str, dict[str, int]] = {}
    outer = 0
    for name, tensor in base.tensors.items():
        match = _LAYER.match(name)
        if match:
            layers.setdefault(match[0], {})[name] = prod(tensor.shape)
        else:
            outer += prod(tensor.shape)
    largest = max(layers.values(), key=lambda tensors: sum(tensors.values()), default={})
    experts = sum(size for name, size in largest.items() if _EXPERT.search(name))
    heads = _number(config, "num_attention_heads") or 1
    hidden = _number(config, "hidden_size") or min((columns for _, columns in base.shapes.values()), default=0)
    head_dim = _number(config, "head_dim") or hidden // heads
    return ModelSizes(
        outer=outer,
        layers=len(layers),
        layer=sum(largest.values()),
        active=sum(largest.values()) - experts + int(experts * _active_share(config)),
        matrix=max(map(prod, base.shapes.values()), default=0),
        hidden=hidden,
        widest_inputs=max((columns for _, columns in base.shapes.values()), default=0),
        widest_outputs=max((rows for rows, _ in base.shapes.values()), default=0),
        vocabulary=_number(config, "vocab_size") or 0,
        kv=2 * len(layers) * (_number(config, "num_key_value_heads") or heads) * head_dim,
    )


def _active_share(config: Mapping[str, Any]) -> float:
    """Return the share of the routed experts that a token passes through."""
    chosen = next((found for key in _EXPERTS_PER_TOKEN if (found := _number(config, key))), 0)
    every = next((found for key in _EXPERTS if (found := _number(config, key))), 0)
    return chosen / every if chosen and every else 1.0


def _number(config: Mapping[str, Any], key: str) -> int | None:
    value = config.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) else None
