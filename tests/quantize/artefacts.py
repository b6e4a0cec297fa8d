"""Quantized directories for tests, made of bytes alone: one block of 64 x 128, every matrix in it quantized."""

import json
import math
import struct
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from config.manifest import Scheme
from quantize.schemes.scheme import preset
from quantize.variants.storage_format import StorageFormat, parts_of

Stored = tuple[str, tuple[int, ...], bytes]  # dtype in safetensors' words, shape, data

BLOCK = "model.layers.0"
MATRICES = {
    f"{BLOCK}.self_attn.q_proj": (64, 64),
    f"{BLOCK}.self_attn.k_proj": (32, 64),
    f"{BLOCK}.self_attn.v_proj": (32, 64),
    f"{BLOCK}.self_attn.o_proj": (64, 64),
    f"{BLOCK}.mlp.gate_proj": (128, 64),
    f"{BLOCK}.mlp.up_proj": (128, 64),
    f"{BLOCK}.mlp.down_proj": (64, 128),
}
OTHERS = {"model.embed_tokens.weight": (8, 64), "model.norm.weight": (64,)}
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "tie_word_embeddings": True,
}
KEPT = {
    "tokenizer.json": '{"vocab": ["/usr/bin/python"]}',
    "chat_template.jinja": "{{ x }}",
    "generation_config.json": "{}",
}
ONE_FP16, ONE_FP32 = b"\x00\x3c", struct.pack("<f", 1.0)
SCHEME = preset("w4a16-g64")


def write_base(directory: Path, **changes: Any) -> Path:
    """Write the unquantized parent."""
    directory.mkdir(parents=True)
    shapes = {f"{name}.weight": shape for name, shape in MATRICES.items()} | OTHERS
    write_tensors(directory / "model.safetensors", {name: _zeros(shape) for name, shape in shapes.items()})
    (directory / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    for name, text in KEPT.items():
        (directory / name).write_text(text)
    return directory


def write_quantized(
    directory: Path, scheme: Scheme = SCHEME, *, tensors: Mapping[str, Stored | None] | None = None, **told: Any
) -> Path:
    """Write a variant that is in order, but for the `tensors` that are given (None removes one) and what is `told`."""
    directory.mkdir(parents=True)
    stored = {name: _zeros(shape) for name, shape in OTHERS.items()}
    for name, shape in MATRICES.items():
        stored |= packed(name, shape, scheme)
    if scheme.kv_cache:
        stored |= {f"{BLOCK}.self_attn.{part}_scale": ("F32", (1,), ONE_FP32) for part in "kv"}
    stored = {name: tensor for name, tensor in {**stored, **(tensors or {})}.items() if tensor}
    write_tensors(directory / "model.safetensors", stored)
    config = {**told_of(scheme), **told}
    (directory / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": config}))
    if scheme.format == "gptq":
        (directory / "quantize_config.json").write_text(json.dumps(config))
    for name, text in KEPT.items():
        (directory / name).write_text(text)
    return directory


def gptq_told(scheme: Scheme) -> dict[str, Any]:
    """What a GPTQ variant's configuration tells."""
    told = {"bits": scheme.bits, "group_size": scheme.group_size, "sym": True, "desc_act": False}
    return {"quant_method": "gptq", **told, "checkpoint_format": "gptq"}


def told_of(scheme: Scheme) -> dict[str, Any]:
    """What a variant's configuration tells."""
    if scheme.compression == "gptq":
        return gptq_told(scheme)
    if scheme.compression == "fp8":
        block = list(scheme.weights.block_structure or ())
        return {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": block}
    inputs = scheme.input_activations
    group = {
        "targets": ["Linear"],
        "weights": scheme.weights.model_dump(exclude_none=True),
        "input_activations": inputs.model_dump(exclude_none=True) if inputs else None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": scheme.compression,
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
        "kv_cache_scheme": scheme.kv_cache.model_dump(exclude_none=True) if scheme.kv_cache else None,
    }


def packed(name: str, shape: tuple[int, int], scheme: Scheme) -> dict[str, Stored]:
    """One quantized matrix: every integer zero, every scale one."""
    outputs, inputs = shape
    if scheme.compression != "gptq":
        parts = parts_of(StorageFormat.of(scheme.compression, scheme.weights), outputs, inputs)
        return {
            f"{name}.{part}": (_dtype(dtypes), shape, _ones(_dtype(dtypes)) * math.prod(shape))
            for part, (dtypes, shape) in parts.items()
        }
    size = scheme.group_size if scheme.group_size > 0 else inputs
    groups, words = inputs // size, outputs * scheme.bits // 32
    middle = b"\x77" if scheme.bits == 4 else b"\x7f"
    return {
        f"{name}.qweight": (
            "I32",
            (inputs * scheme.bits // 32, outputs),
            middle * (outputs * inputs * scheme.bits // 8),
        ),
        f"{name}.qzeros": ("I32", (groups, words), middle * (groups * words * 4)),
        f"{name}.scales": ("F16", (groups, outputs), ONE_FP16 * (groups * outputs)),
        f"{name}.g_idx": ("I32", (inputs,), array("i", (column // size for column in range(inputs))).tobytes()),
    }


def _dtype(dtypes: tuple[str, ...]) -> str:
    return "F32" if "F32" in dtypes else dtypes[0]


def _ones(dtype: str) -> bytes:
    return {"F32": ONE_FP32, "F8_E4M3": b"\x38", "I32": bytes(4), "I64": bytes(8)}.get(dtype, b"\0")


def write_tensors(path: Path, tensors: Mapping[str, Stored]) -> None:
    """Write a safetensors file."""
    header: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape, data) in tensors.items():
        start, end = end, end + len(data)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    data = b"".join(data for _, _, data in tensors.values())
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)


def _zeros(shape: tuple[int, ...]) -> Stored:
    return "BF16", shape, bytes(2 * math.prod(shape))
