"""Which program of this package makes a variant of a scheme, if any; other schemes are loaded and adopted."""

from config.manifest import Scheme
from quantize.errors import RecipeError
from quantize.schemes.scheme import PRESETS

# Rounds weights to FP8 without calibration data (`quantize.backends.fp8`).
RTN_FP8 = "rtn-fp8"
# Raise this when the same weights are rounded otherwise.
RTN_FP8_VERSION = "1"


def is_data_free(scheme: Scheme) -> bool:
    """Whether the weights of a variant depend on its base alone."""
    return scheme.compression in ("float-quantized", "fp8")


def require_made(scheme: Scheme) -> None:
    """Raise RecipeError for a scheme that vLLM loads and that nothing here makes."""
    if _is_made(scheme):
        return
    made = ", ".join(name for name, preset in PRESETS.items() if _is_made(preset))
    raise RecipeError(
        f"scheme {scheme.name} is loaded, not made: quantize with another tool (llm-compressor, ModelOpt), then "
        f"`quantgate variants adopt DIR`; schemes that are made: {made}"
    )


def _is_made(scheme: Scheme) -> bool:
    weights = scheme.weights
    if scheme.compression == "gptq":
        return weights.symmetric
    if scheme.compression == "pack-quantized":
        # Symmetric int4 is made as GPTQ, which more engines load.
        return not weights.symmetric
    plain = scheme.model_copy(update={"name": "", "overrides": (), "kv_cache": None})
    return any(plain == _unnamed(PRESETS[name]) for name in ("w8a8", "fp8-dynamic", "fp8-block"))


def _unnamed(scheme: Scheme) -> Scheme:
    return scheme.model_copy(update={"name": ""})
