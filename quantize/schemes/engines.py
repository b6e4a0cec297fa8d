"""Which engines load a scheme, with which kernels, and what a search may choose from for them. From vLLM 0.32 on."""

from config.manifest import Engine, Scheme
from quantize.errors import RecipeError
from quantize.schemes.module_config import WeightArgs
from quantize.schemes.scheme import GPTQ_BITS, GPTQ_GROUPS, faults

ENGINES: tuple[Engine, ...] = ("cuda", "cpu")


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
