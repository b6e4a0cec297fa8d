"""Which engines load a scheme, with which kernels, and what a search may choose from for them. From vLLM 0.32 on."""

import re
from collections.abc import Mapping
from types import MappingProxyType

from config.manifest import Engine, Scheme
from quantize.base import BaseModel
from quantize.errors import RecipeError
from quantize.schemes.module_config import WeightArgs, weight_args_of
from quantize.schemes.scheme import GPTQ_BITS, GPTQ_GROUPS, faults

ENGINES: tuple[Engine, ...] = ("cuda", "cpu")

_KEEP_EXPERTS = "keep them with --override '*.experts.*=keep'"
# Families whose experts vLLM 0.32 loads in other formats than these (gpt_oss.py: no `qweight`; llama4.py: transposed).
_OTHER_EXPERTS: Mapping[str, str] = MappingProxyType(
    {
        "gpt_oss": "vLLM loads the experts of gpt_oss unquantized, in MXFP4 or from Quark",
        "llama4": "vLLM loads the experts of llama4 unquantized or in FP8",
        "llama4_text": "vLLM loads the experts of llama4 unquantized or in FP8",
    }
)
_AMX = re.compile(r"^flags\s*:.*\bamx_tile\b", re.MULTILINE)


def refusals(scheme: Scheme) -> dict[Engine, str]:
    """Tell which engines can't load a scheme, and why; an engine that is not named loads it."""
    problems = faults(scheme)
    if problems:
        return {"cpu": "; ".join(problems), "cuda": "; ".join(problems)}
    if scheme.format == "gptq" and scheme.bits == 8:
        return {"cpu": "vLLM has no CPU kernel for 8-bit GPTQ; use w8a8, or --engine cuda for another machine"}
    wide = [override.modules for override in scheme.overrides if override.bits == 8]
    if scheme.format == "gptq" and wide:
        reason = f"vLLM has no CPU kernel for 8-bit GPTQ, and {wide[0]} asks for it"
        return {"cpu": f"{reason}; keep these modules, or --engine cuda for another machine"}
    return {}


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
        "cpu": f"vLLM has no kernel for int{scheme.bits} experts on a CPU without AMX; {_KEEP_EXPERTS}, "
        "or --engine cuda for another machine"
    }


def has_amx(cpuinfo: str) -> bool:
    """Tell from the text of /proc/cpuinfo whether a CPU has AMX tiles."""
    return _AMX.search(cpuinfo) is not None


def require_engine(scheme: Scheme, engine: Engine) -> None:
    """Raise RecipeError where `engine` can't load `scheme`."""
    reason = refusals(scheme).get(engine)
    if reason:
        raise RecipeError(f"scheme {scheme.name} doesn't load on engine {engine}: {reason}")


def kernels(scheme: Scheme, engine: Engine) -> str:
    """Name the kernels that an engine which loads a scheme will run it with."""
    if scheme.format == "compressed-tensors":
        return "CUTLASS or Triton int8, from Turing on" if engine == "cuda" else "CPUInt8ScaledMM"
    if engine == "cpu":
        return "CPUWNA16"
    groups = {
        scheme.group_size,
        *(override.group_size for override in scheme.overrides if override.group_size is not None),
    }
    return "Marlin, from Turing on" if 32 in groups else "Machete on Hopper, else Marlin, from Turing on"


def choices(engine: Engine, shape: tuple[int, int]) -> tuple[WeightArgs, ...]:
    """List the numbers that a GPTQ module of (out_features, in_features) may get on an engine, smallest file first."""
    _, columns = shape
    return tuple(
        WeightArgs(bits, group_size)
        for bits in GPTQ_BITS
        for group_size in sorted(GPTQ_GROUPS[1:], reverse=True)
        if columns % group_size == 0 and (bits == 4 or engine == "cuda")
    )
