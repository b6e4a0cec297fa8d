"""Which engines load a scheme, with which kernels, and what a search may choose from for them (`config.vllm`)."""

import re
from collections.abc import Mapping
from types import MappingProxyType

from config.manifest import Engine, Scheme
from config.quantization import Compression, QuantizationScheme
from config.vllm import CPU_EXPERT_FLAG, ENGINES, GPTQ_BITS, GPTQ_GROUPS, refusal, supports
from config.vllm import kernels as kernels_of
from quantize.base import BaseModel
from quantize.errors import RecipeError
from quantize.schemes.module_config import WeightArgs, quantization_args, weight_args_of
from quantize.schemes.scheme import faults, layer_schemes

_KEEP_EXPERTS = "keep them with --override '*.experts.*=keep'"
_ELSEWHERE = "or --engine cuda for another machine"
# Families whose experts vLLM 0.32 loads in other formats than these (gpt_oss.py: no `qweight`; llama4.py: transposed).
_OTHER_EXPERTS: Mapping[str, str] = MappingProxyType(
    {
        "gpt_oss": "vLLM loads the experts of gpt_oss unquantized, in MXFP4 or from Quark",
        "llama4": "vLLM loads the experts of llama4 unquantized or in FP8",
        "llama4_text": "vLLM loads the experts of llama4 unquantized or in FP8",
    }
)


def refusals(scheme: Scheme, flags: frozenset[str] | None = None) -> dict[Engine, str]:
    """Tell which engines can't load a scheme, and why; an engine that is not named loads it.

    `flags` are instruction sets of the CPU that is asked about; None: of any CPU.
    """
    problems = faults(scheme)
    if problems:
        return dict.fromkeys(ENGINES, "; ".join(problems))
    found: dict[Engine, str] = {}
    for engine in ENGINES:
        reasons = [reason for layer in layer_schemes(scheme) if (reason := refusal(layer, engine, flags))]
        if reasons:
            found[engine] = f"{reasons[0]}, {_ELSEWHERE}" if engine == "cpu" else reasons[0]
    return found


def expert_refusals(scheme: Scheme, base: BaseModel, *, amx: bool) -> dict[Engine, str]:
    """Tell which engines can't load a base's experts in a scheme, and why; {} where none of them is quantized.

    `amx`: the CPU that is asked about has AMX, which vLLM's CPU kernels for int4 and int8 experts need.
    """
    if not any(layer.is_expert and weight_args_of(layer.stored_name, scheme) for layer in base.modules.layers):
        return {}
    family = str(base.config.get("model_type"))
    if family in _OTHER_EXPERTS:
        reason = f"{_OTHER_EXPERTS[family]}; {_KEEP_EXPERTS}"
        return {"cpu": reason, "cuda": reason}
    if amx:
        return {}
    return {
        "cpu": f"vLLM has no kernel for {scheme.precision} experts on a CPU without AMX; {_KEEP_EXPERTS}, {_ELSEWHERE}"
    }


def has_amx(cpuinfo: str) -> bool:
    """Tell from the text of /proc/cpuinfo whether a CPU has AMX tiles."""
    return re.search(rf"^flags\s*:.*\b{CPU_EXPERT_FLAG}\b", cpuinfo, re.MULTILINE) is not None


def require_engine(scheme: Scheme, engine: Engine) -> None:
    """Raise RecipeError where `engine` can't load `scheme`."""
    reason = refusals(scheme).get(engine)
    if reason:
        raise RecipeError(f"scheme {scheme.name} doesn't load on engine {engine}: {reason}")


def kernels(scheme: Scheme, engine: Engine) -> str:
    """Name the kernels that an engine which loads a scheme will run it with."""
    layers = layer_schemes(scheme)
    # The narrowest groups of a mixed scheme decide: they have the fewest kernels.
    return kernels_of(min(layers, key=lambda layer: layer.weights.columns % (1 << 30)), engine)


def choices(
    engine: Engine, shape: tuple[int, int], *, channels: bool = False, zero_points: bool = False
) -> tuple[WeightArgs, ...]:
    """List the numbers that a module of (out_features, in_features) may get on an engine, smallest file first.

    With `channels`, one scale for all inputs (group size -1) is among them. With `zero_points` it is stored as
    compressed-tensors, and 4 bits have them; otherwise as GPTQ.
    """
    _, columns = shape
    compression: Compression = "pack-quantized" if zero_points else "gptq"
    return tuple(
        WeightArgs(bits, group_size)
        for bits in GPTQ_BITS
        for group_size in (*((-1,) if channels else ()), *sorted(GPTQ_GROUPS[1:], reverse=True))
        if columns % group_size == 0
        and supports(
            QuantizationScheme(compression, quantization_args(WeightArgs(bits, group_size), zero_points=zero_points)),
            engine,
        )
    )
