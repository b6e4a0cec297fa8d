"""Weight formats whose loading is tried in the installed vLLM: every preset, and rows of the table beside them."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from config.manifest import Override, Scheme
from config.quantization import COMPRESSED_TENSORS, QuantizationArgs, QuantizationScheme, grouped
from quantize.schemes.scheme import PRESETS, layer_schemes

_FLOAT = QuantizationArgs(type="float")
_NVFP4 = QuantizationArgs(num_bits=4, type="float", strategy="tensor_group", group_size=16)
_FP8_TOKENS = QuantizationArgs(type="float", strategy="token", dynamic=True)
_FP8_CHANNELS = QuantizationArgs(type="float", strategy="channel")
_FP8_BLOCKS = QuantizationArgs(type="float", strategy="block", block_structure=(128, 128))
_FP8_GROUPS = QuantizationArgs(type="float", strategy="group", group_size=128, dynamic=True)

CASES: Mapping[str, QuantizationScheme] = MappingProxyType(
    {name: layer_schemes(preset)[0] for name, preset in PRESETS.items()}
    | {
        "gptq-channel": QuantizationScheme("gptq", grouped(4, -1)),
        "gptq-2-bits": QuantizationScheme("gptq", grouped(2, 128)),
        "gptq-asym": QuantizationScheme("gptq", grouped(4, 128, symmetric=False)),
        "gptq-desc-act": QuantizationScheme("gptq", grouped(4, 128, actorder="group")),
        "gptq-g16": QuantizationScheme("gptq", grouped(4, 16)),
        "awq": QuantizationScheme("awq", grouped(4, 128, symmetric=False)),
        "pack-4": QuantizationScheme("pack-quantized", grouped(4, 128)),
        "pack-4-channel": QuantizationScheme("pack-quantized", grouped(4, -1)),
        "pack-8": QuantizationScheme("pack-quantized", grouped(8, 128)),
        "ct-fp8-tensor": QuantizationScheme("float-quantized", _FLOAT, _FP8_TOKENS),
        "ct-fp8-block": QuantizationScheme("float-quantized", _FP8_BLOCKS, _FP8_GROUPS),
        "ct-fp8-a16": QuantizationScheme("float-quantized", _FP8_CHANNELS),
        "naive-fp8": QuantizationScheme("naive-quantized", _FP8_CHANNELS, _FP8_TOKENS),
        "fp8-tensor": QuantizationScheme("fp8", _FLOAT, _FLOAT.model_copy(update={"dynamic": True})),
        "nf4": QuantizationScheme(
            "bitsandbytes", QuantizationArgs(num_bits=4, type="float", strategy="group", group_size=64)
        ),
        "modelopt-nvfp4": QuantizationScheme("modelopt", _NVFP4, _NVFP4),
    }
)

# q, k and v in other groups than the rest: vLLM looks them up by the name of the matrix that they become.
_OTHER_GROUPS = (Override(modules="*.self_attn.[qkv]_proj", bits=4, group_size=32),)
MIXED_CASES: Mapping[str, Scheme] = MappingProxyType(
    {
        f"{name}-mixed": PRESETS[name].model_copy(update={"overrides": _OTHER_GROUPS})
        for name in ("w4a16-g128", "w4a16-asym")
    }
)

# Of the numbers of an FP8 KV cache beside weights that are stored so: keys, values.
CACHE_SCALES = (0.25, 0.125)
CACHE_CASES = ("w8a8", "fp8-dynamic", "w4a16-asym", "w4a16-g128")


def quantization_config(scheme: QuantizationScheme) -> dict[str, Any]:
    """Describe layers as config.json does."""
    weights, inputs = scheme.weights, scheme.input_activations
    if scheme.compression in COMPRESSED_TENSORS:
        group = {
            "targets": ["Linear"],
            "weights": weights.model_dump(exclude_none=True),
            "input_activations": inputs.model_dump(exclude_none=True) if inputs else None,
        }
        method = {"quant_method": "compressed-tensors", "format": scheme.compression}
        return {**method, "ignore": ["lm_head"], "quantization_status": "compressed", "config_groups": {"0": group}}
    numbers = {"bits": weights.num_bits, "group_size": weights.columns}
    others: dict[str, dict[str, Any]] = {
        "gptq": {**numbers, "sym": weights.symmetric, "desc_act": weights.actorder == "group"},
        "awq": {**numbers, "zero_point": not weights.symmetric, "version": "gemm"},
        "fp8": {
            "activation_scheme": "dynamic",
            **({"weight_block_size": list(weights.block_structure)} if weights.block_structure else {}),
        },
        "bitsandbytes": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        "modelopt": {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]},
    }
    return {"quant_method": scheme.compression, **others[scheme.compression]}
