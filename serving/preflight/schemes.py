"""Can the tested vLLM load a quantized model on an engine, shared by its ranks? Pure; the table is `config.vllm`."""

from collections.abc import Iterator, Mapping
from typing import Any

from config.manifest import Engine
from config.quantization import QuantizationScheme, missing_keys, schemes_of
from config.vllm import FP8_TILE, float32_refusal, refusal, tile
from serving.preflight.facts import ModelFacts


def unloadable(
    quantization: Mapping[str, Any] | None, engine: Engine, flags: frozenset[str] | None = None
) -> str | None:
    """Say why vLLM can't load a `quantization_config` on an engine, or None if it can.

    `flags` are the instruction sets of the CPU; None: of any CPU. Methods that the table doesn't know are not refused.
    """
    missing = missing_keys(quantization or {})
    if missing:
        return f"its quantization_config has no {', '.join(missing)}, which vLLM requires; copy the model again"
    return next((reason for scheme in schemes_of(quantization) if (reason := refusal(scheme, engine, flags))), None)


def computes_in(quantization: Mapping[str, Any], engine: Engine, dtype: str) -> str | None:
    """Say why a quantized model can't compute in a dtype, or None."""
    if dtype != "float32":
        return None
    return next((why for scheme in schemes_of(quantization) if (why := float32_refusal(scheme, engine))), None)


def unfit_shape(model: ModelFacts, engine: Engine, tensor_parallel: int) -> str | None:
    """Say which matrix of a quantized model has a size that no kernel takes, once it is shared by the ranks."""
    schemes = schemes_of(model.quantization)
    # A rule of a GPTQ configuration may be about some layers only; a regular expression says which.
    plain = (
        [scheme for scheme in schemes if not scheme.where] if schemes and schemes[0].compression == "gptq" else schemes
    )
    for what, inputs, outputs in _matrices(model, tensor_parallel):
        for scheme in plain:
            reason = _unfit(what, inputs, outputs, scheme, engine)
            if reason:
                return f"{reason}; {_advice(tensor_parallel)}"
    return None


def _unfit(what: str, inputs: int, outputs: int, scheme: QuantizationScheme, engine: Engine) -> str | None:
    block = scheme.weights.block_structure
    if block is not None:
        # vLLM's validate_fp8_block_shape lets a matrix end in part of a block if no other rank has the rest.
        return None
    group = scheme.weights.columns
    if group > 0 and inputs % group:
        return f"{what}: {inputs} inputs per rank are not whole groups of {group}"
    multiple = tile(scheme.weights)
    packed = scheme.weights.num_bits == 4 and engine == "cpu"
    if (packed or multiple == FP8_TILE) and (inputs % multiple or outputs % multiple):
        kind = "int4 on CPU" if packed else "FP8"
        return (
            f"{what}: {inputs} inputs and {outputs} outputs per rank are not both multiples of {multiple}, "
            f"as {kind} needs"
        )
    return None


def _advice(tensor_parallel: int) -> str:
    return "use a smaller tensor_parallel" if tensor_parallel > 1 else "quantize with another group size"


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
