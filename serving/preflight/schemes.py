"""Can vLLM 0.32 load a quantization on an engine? Pure.

Rules: vllm/model_executor/layers/quantization/auto_gptq.py and utils/gptq_utils.py (GPTQ), compressed_tensors/
(compressed-tensors), and kernels/linear/mixed_precision/cpu.py for shapes on CPU.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from config.manifest import Engine
from serving.preflight.facts import ModelFacts

GROUP_SIZES = (-1, 32, 64, 128)
CPU_TILE = 32
_INT4_BITS, _INT8_BITS = 4, 8


@dataclass(frozen=True, slots=True)
class _Numbers:
    """What the numbers of some layers look like: `where` is a rule of `dynamic`, or nothing for all others."""

    bits: Any
    group_size: Any
    sym: Any
    desc_act: Any
    where: str = ""


def unloadable(quantization: Mapping[str, Any] | None, engine: Engine) -> str | None:
    """Say why vLLM can't load a `quantization_config` on an engine, or None if it can."""
    match (quantization or {}).get("quant_method"):
        case "gptq":
            assert quantization is not None
            return next(filter(None, (_bad_gptq(numbers, engine) for numbers in _gptq_numbers(quantization))), None)
        case "compressed-tensors":
            assert quantization is not None
            return _bad_compressed(quantization, engine)
        case _:
            return None


def computes_in(quantization: Mapping[str, Any], engine: Engine, dtype: str) -> str | None:
    """Say why a quantized model can't compute in a dtype, or None."""
    gptq = quantization.get("quant_method") == "gptq"
    packed = any(bits == _INT4_BITS for bits in _weight_bits(quantization))
    if dtype == "float32" and (gptq or (packed and engine == "cpu")):
        what = "GPTQ" if gptq else "int4 on CPU"
        return f"{what} does not compute in float32; leave dtype out, or use bfloat16"
    return None


def unfit_shape(model: ModelFacts, engine: Engine, tensor_parallel: int) -> str | None:
    """Say which matrix of a quantized model has a size that no kernel takes, once it is shared by the ranks."""
    quantization = model.quantization
    if quantization is None:
        return None
    for what, inputs, outputs in _matrices(model, tensor_parallel):
        for group in _group_sizes(quantization):
            if group > 0 and inputs % group:
                return f"{what}: {inputs} inputs per rank are not whole groups of {group}; {_advice(tensor_parallel)}"
        packed = any(bits == _INT4_BITS for bits in _weight_bits(quantization))
        if packed and engine == "cpu" and (inputs % CPU_TILE or outputs % CPU_TILE):
            odd = f"{inputs} inputs and {outputs} outputs per rank"
            return (
                f"{what}: {odd} are not both multiples of {CPU_TILE}, as int4 on CPU needs; {_advice(tensor_parallel)}"
            )
    return None


def _advice(tensor_parallel: int) -> str:
    return "use a smaller tensor_parallel" if tensor_parallel > 1 else "quantize with another group size"


def _gptq_numbers(quantization: Mapping[str, Any]) -> Iterator[_Numbers]:
    yield _numbers(quantization, "")
    for rule, changes in (quantization.get("dynamic") or {}).items():
        if not rule.startswith("-:") and isinstance(changes, Mapping):
            yield _numbers({**quantization, **changes}, f" (rule {rule!r})")


def _numbers(config: Mapping[str, Any], where: str) -> _Numbers:
    return _Numbers(config.get("bits"), config.get("group_size"), config.get("sym"), config.get("desc_act"), where)


def _bad_gptq(numbers: _Numbers, engine: Engine) -> str | None:
    where = numbers.where
    if numbers.bits not in (_INT4_BITS, _INT8_BITS):
        return f"GPTQ with {numbers.bits} bits{where} is not served by vLLM; quantize to 4 or 8 bits"
    if numbers.sym is not True:
        return f"asymmetric GPTQ{where} is not served by vLLM; quantize with sym: true"
    if numbers.group_size not in GROUP_SIZES:
        known = ", ".join(map(str, GROUP_SIZES))
        return f"GPTQ group size {numbers.group_size}{where} is not served by vLLM; use one of {known}"
    if numbers.desc_act and numbers.group_size != -1:
        return f"GPTQ with desc_act{where} is not served by vLLM; quantize with desc_act: false"
    if numbers.bits == _INT8_BITS and engine == "cpu":
        return f"GPTQ int8{where} does not load on CPU; use scheme w8a8, which loads on CPU and CUDA"
    return None


def _bad_compressed(quantization: Mapping[str, Any], engine: Engine) -> str | None:
    for group in _config_groups(quantization):
        weights, inputs = group.get("weights") or {}, group.get("input_activations")
        if weights.get("type", "int") != "int":
            continue
        bits = weights.get("num_bits")
        if inputs is None and bits not in (_INT4_BITS, _INT8_BITS):
            return f"compressed-tensors with {bits} bits is not served by vLLM; quantize to 4 or 8 bits"
        if inputs is None and engine == "cpu" and bits == _INT8_BITS:
            return "int8 weights without int8 activations do not load on CPU; use scheme w8a8"
        if weights.get("actorder") in ("group", "dynamic", True):
            return "compressed-tensors with actorder is not served by vLLM, except static; quantize without it"
    return None


def _config_groups(quantization: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = quantization.get("config_groups")
    return [group for group in groups.values() if isinstance(group, Mapping)] if isinstance(groups, Mapping) else []


def _weight_bits(quantization: Mapping[str, Any]) -> list[Any]:
    if quantization.get("quant_method") == "gptq":
        return [numbers.bits for numbers in _gptq_numbers(quantization)]
    return [(group.get("weights") or {}).get("num_bits") for group in _config_groups(quantization)]


def _group_sizes(quantization: Mapping[str, Any]) -> list[int]:
    if quantization.get("quant_method") == "gptq":
        # A rule may be about some layers only, whose shapes it would take a regular expression to know.
        sizes = [next(_gptq_numbers(quantization)).group_size]
    else:
        sizes = [(group.get("weights") or {}).get("group_size") for group in _config_groups(quantization)]
    return [size for size in sizes if isinstance(size, int)]


def _matrices(model: ModelFacts, ranks: int) -> Iterator[tuple[str, int, int]]:
    """Each kind of matrix of a decoder layer as one rank has it, fused as vLLM does: name, inputs, outputs."""
    hidden, inner = model.number("hidden_size"), model.number("intermediate_size")
    heads, key_value, size = model.heads, model.key_value_heads, model.head_size
    if hidden and heads and key_value and size and "kv_lora_rank" not in model.text:
        queries = heads * size // ranks
        yield "qkv_proj", hidden, queries + 2 * max(1, key_value // ranks) * size
        yield "o_proj", queries, hidden
    if hidden and inner:
        yield "gate_up_proj", hidden, 2 * inner // ranks
        yield "down_proj", inner // ranks, hidden
