"""Sizes and names of the models that transforms support."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

EMBEDDINGS, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True, slots=True)
class Layout:
    """Sizes of a supported model; its blocks have the names of Llama's."""

    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    tied: bool

    @classmethod
    def of(cls, config: Mapping[str, Any], stored: Collection[str]) -> "Layout":
        """Read the sizes from a config.json; `stored` are the names of the model's tensors."""
        heads = config["num_attention_heads"]
        return cls(
            layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            intermediate_size=config["intermediate_size"],
            tied=LM_HEAD not in stored or bool(config.get("tie_word_embeddings")),
        )
