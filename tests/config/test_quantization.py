"""A quantization_config of any method is read into the words of compressed-tensors."""

from typing import Any

import pytest

from config.quantization import QuantizationArgs, kv_cache_of, missing_keys, precision_of, schemes_of

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
FP8 = {"num_bits": 8, "type": "float"}
FP8_DYNAMIC = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            # llm-compressor writes arguments of its observer, too.
            "weights": {**FP8, "strategy": "channel", "observer": "minmax", "observer_kwargs": {}},
            "input_activations": {**FP8, "strategy": "token", "dynamic": True},
        }
    },
}
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.mark.parametrize(
    "config,compression,precision,columns,inputs",
    [
        (GPTQ, "gptq", "int4", 128, None),
        ({**GPTQ, "bits": 8, "group_size": -1}, "gptq", "int8", -1, None),
        ({"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True}, "awq", "int4", 64, None),
        ({"quant_method": "awq", "w_bit": 4, "q_group_size": 32}, "awq", "int4", 32, None),
        (FP8_DYNAMIC, "float-quantized", "fp8", -1, "fp8"),
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "fp8", "fp8", -1, "fp8"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8", "fp8", 128, "fp8"),
        (NF4, "bitsandbytes", "fp4", 64, None),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes", "int8", -1, None),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt", "fp4", 16, "fp4"),
        ({"quant_method": "modelopt", "quantization": {"quant_algo": "FP8"}}, "modelopt", "fp8", -1, "fp8"),
        ({"quant_method": "mxfp4"}, "mxfp4", "fp4", 32, None),
    ],
)
def test_methods(config: dict[str, Any], compression: str, precision: str, columns: int, inputs: str | None) -> None:
    """Each method has its own words for the same things."""
    (scheme,) = schemes_of(config)
    found = scheme.input_activations.precision if scheme.input_activations else None
    assert (scheme.compression, precision_of(config), scheme.weights.columns, found) == (
        compression,
        precision,
        columns,
        inputs,
    )


@pytest.mark.parametrize(
    "config", [None, {}, {"quant_method": "quark"}, {"quant_method": "gptq"}, {**GPTQ, "bits": "four"}]
)
def test_what_is_not_known_is_empty(config: dict[str, Any] | None) -> None:
    """An unknown method, or numbers that are none, are not guessed at."""
    assert schemes_of(config) == ()
    assert precision_of(config) is None


def test_rules_of_gptq_are_schemes_of_their_own() -> None:
    """A rule that leaves modules alone has no numbers."""
    config = {**GPTQ, "dynamic": {"+:.*down": {"bits": 8}, "-:.*gate": {}}}
    assert [(scheme.weights.num_bits, scheme.where) for scheme in schemes_of(config)] == [
        (4, ""),
        (8, " (rule '+:.*down')"),
    ]


def test_keys_that_vllm_requires() -> None:
    """vLLM refuses a configuration without them."""
    assert missing_keys({"quant_method": "gptq", "bits": 4}) == ("group_size", "desc_act", "sym")
    assert missing_keys({"quant_method": "fp8"}) == ("activation_scheme",)
    assert missing_keys(FP8_DYNAMIC) == ()


def test_kv_cache() -> None:
    """Checkpoints with scales for an FP8 KV cache say so."""
    assert kv_cache_of(FP8_DYNAMIC) is None
    config = {**FP8_DYNAMIC, "kv_cache_scheme": {**FP8, "strategy": "tensor", "dynamic": False, "symmetric": True}}
    assert kv_cache_of(config) == QuantizationArgs(type="float", strategy="tensor")
