"""Bases that exist as shapes only: published models by their dimensions."""

from math import prod
from pathlib import Path

from quantize.base import BaseModel, linear_shapes
from quantize.model_files.safetensors_header import StoredTensor

_BF16_BYTES = 2


def qwen2(name: str, *, layers: int, hidden: int, inner: int, heads: int, kv_heads: int, vocabulary: int) -> BaseModel:
    """A model of the qwen2 architecture (heads of 128, biases on q, k and v, untied embeddings) in bf16."""
    tensors: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "lm_head.weight": (vocabulary, hidden),
    }
    for layer in range(layers):
        block = f"model.layers.{layer}"
        for part, size in (("q", heads * 128), ("k", kv_heads * 128), ("v", kv_heads * 128)):
            tensors[f"{block}.self_attn.{part}_proj.weight"] = (size, hidden)
            tensors[f"{block}.self_attn.{part}_proj.bias"] = (size,)
        tensors[f"{block}.self_attn.o_proj.weight"] = (hidden, heads * 128)
        tensors[f"{block}.mlp.gate_proj.weight"] = (inner, hidden)
        tensors[f"{block}.mlp.up_proj.weight"] = (inner, hidden)
        tensors[f"{block}.mlp.down_proj.weight"] = (hidden, inner)
        tensors[f"{block}.input_layernorm.weight"] = (hidden,)
    stored = {tensor: StoredTensor(shape, prod(shape) * _BF16_BYTES) for tensor, shape in tensors.items()}
    config = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "head_dim": 128}
    config |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    total = sum(tensor.bytes for tensor in stored.values())
    return BaseModel(Path("/models") / name, name, "bf16", "d" * 64, total, config, linear_shapes(stored), stored)


QWQ_32B = qwen2("QwQ-32B", layers=64, hidden=5120, inner=27648, heads=40, kv_heads=8, vocabulary=152064)
QWEN_72B = qwen2("Qwen2.5-72B", layers=1, hidden=8192, inner=29568, heads=64, kv_heads=8, vocabulary=152064)
