"""Scales of an FP8 KV cache: for which models, under which names, how many. Pure; no torch.

vLLM finds `<attention>.k_scale` and `.v_scale` in a checkpoint (get_cache_scale_mapper of its base_config.py).
"""

import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from config.manifest import Engine, Scheme
from config.quantization import QuantizationArgs
from quantize.base import BaseModel
from quantize.modules import inside_blocks

FP8_CACHE = QuantizationArgs(type="float", strategy="tensor")
KEYS, VALUES = ".k_scale", ".v_scale"
SCALE_BYTES = 4
# What llm-compressor writes beside them; vLLM reads queries' scales, and no zero points.
CACHE_TENSORS = (KEYS, VALUES, ".q_scale", ".k_zero_point", ".v_zero_point", ".q_zero_point")
# The matrices that make keys, alone or with queries and values.
_KEYS_MADE = r"k_proj|qkv_proj|query_key_value|c_attn|Wqkv"
_ATTENTION = re.compile(rf"(?P<attention>.*\b(?:layers|h|blocks)\.(?P<layer>\d+)\..+)\.(?:{_KEYS_MADE})\.[^.]+$")
_VISION = re.compile(r"(^|\.)(vision|visual)")
# Head sizes of the CPU's FP8 cache are multiples of it (_get_attn_isa of vLLM's cpu_attn.py).
_CPU_HEAD_TILE = 32
_DTYPE_BYTES: Mapping[str, int] = MappingProxyType({"float32": 4})


def attention_names(tensors: Iterable[str], layers: int) -> tuple[str, ...]:
    """Name the attention modules on disk that make keys and values, in the order of a model's first `layers` layers."""
    found = {
        int(match["layer"]): match["attention"]
        for name in tensors
        if (match := _ATTENTION.match(name)) and not _VISION.search(name)
    }
    return tuple(found[layer] for layer in sorted(found) if layer < layers)


def layer_count(config: Mapping[str, Any]) -> int:
    """Count a model's decoder layers, without those that predict further tokens."""
    text = config.get("text_config", config)
    return int(text.get("num_hidden_layers") or text.get("n_layer") or 0)


def scale_names(base: BaseModel) -> dict[str, tuple[str, str]]:
    """Map each layer, named as inside the blocks, to the names of its scales on disk: of keys, of values."""
    names = attention_names(base.tensors, layer_count(base.config))
    return {inside_blocks(f"{name}.")[:-1]: (f"{name}{KEYS}", f"{name}{VALUES}") for name in names}


def cache_misfit(scheme: Scheme, base: BaseModel, engine: Engine) -> str | None:
    """Say why a base gets no scales of an FP8 cache, or None."""
    if scheme.kv_cache is None:
        return None
    text = base.config.get("text_config", base.config)
    layers, found = layer_count(base.config), len(scale_names(base))
    if text.get("kv_lora_rank"):
        return "its KV cache has latents (MLA), of which no scales are measured; leave out --kv-cache fp8"
    if found != layers or text.get("num_kv_shared_layers"):
        return (
            f"{found} of its {layers} layers have keys and values of their own, and --kv-cache fp8 needs all; "
            "leave it out"
        )
    size = head_size(base)
    if engine == "cpu" and size % _CPU_HEAD_TILE:
        return f"its head size is {size}, and vLLM's FP8 cache on CPU takes multiples of {_CPU_HEAD_TILE}"
    return None


def head_size(base: BaseModel) -> int:
    """Tell the size of an attention head; 0: unknown."""
    text = base.config.get("text_config", base.config)
    heads, hidden = text.get("num_attention_heads"), text.get("hidden_size")
    return int(text.get("head_dim") or (hidden // heads if heads and hidden else 0))


def token_bytes(scheme: Scheme, base: BaseModel) -> tuple[int, int]:
    """Bytes of one token in the KV cache: with the scheme, and in the base's dtype; 0 where heads are unknown."""
    text = base.config.get("text_config", base.config)
    heads = text.get("num_key_value_heads") or text.get("num_attention_heads") or 0
    values = 2 * layer_count(base.config) * heads * head_size(base)
    plain = values * _DTYPE_BYTES.get(base.dtype, 2)
    return (plain if scheme.kv_cache is None else values), plain
