"""Schemes are data: named presets, exceptions by module, and what vLLM loads of them (`config.vllm`)."""

from collections.abc import Mapping
from difflib import get_close_matches
from types import MappingProxyType

from config.manifest import Override, Scheme
from config.quantization import COMPRESSED_TENSORS, QuantizationArgs, QuantizationScheme, grouped
from config.vllm import GPTQ_GROUPS, cache_scales_refusal, loaded_anywhere, refusal
from quantize.errors import RecipeError
from quantize.schemes.module_config import is_symmetric

_INT8_TOKENS = QuantizationArgs(strategy="token", dynamic=True)
_FP8_TOKENS = QuantizationArgs(type="float", strategy="token", dynamic=True)


def _gptq(name: str, bits: int, group_size: int) -> Scheme:
    return Scheme(name=name, compression="gptq", weights=grouped(bits, group_size))


def _asymmetric(name: str, bits: int, group_size: int) -> Scheme:
    return Scheme(name=name, compression="pack-quantized", weights=grouped(bits, group_size, symmetric=False))


_W8A8 = Scheme(
    name="w8a8",
    compression="int-quantized",
    weights=QuantizationArgs(strategy="channel"),
    input_activations=_INT8_TOKENS,
)

PRESETS: Mapping[str, Scheme] = MappingProxyType(
    {
        scheme.name: scheme
        for scheme in (
            _gptq("w4a16-g128", 4, 128),
            _gptq("w4a16-g64", 4, 64),
            _gptq("w4a16-g32", 4, 32),
            _gptq("w8a16-g128", 8, 128),
            _gptq("w8a16-channel", 8, -1),
            _W8A8,
            Scheme(
                name="fp8-dynamic",
                compression="float-quantized",
                weights=QuantizationArgs(type="float", strategy="channel"),
                input_activations=_FP8_TOKENS,
            ),
            # As DeepSeek and Qwen publish them.
            Scheme(
                name="fp8-block",
                compression="fp8",
                weights=QuantizationArgs(type="float", strategy="block", block_structure=(128, 128)),
                input_activations=QuantizationArgs(type="float", strategy="group", group_size=128, dynamic=True),
            ),
            _asymmetric("w4a16-asym", 4, 128),
            _asymmetric("w4a16-asym-g64", 4, 64),
            Scheme(
                name="nvfp4a16",
                compression="nvfp4-pack-quantized",
                weights=QuantizationArgs(num_bits=4, type="float", strategy="tensor_group", group_size=16),
            ),
            Scheme(
                name="mxfp4",
                compression="mxfp4-pack-quantized",
                weights=QuantizationArgs(num_bits=4, type="float", strategy="group", group_size=32),
            ),
        )
    },
)


def preset(name: str) -> Scheme:
    """Look a scheme up by name; RecipeError proposes the nearest name."""
    if name in PRESETS:
        return PRESETS[name]
    near = get_close_matches(name, PRESETS, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}? " if near else ""
    raise RecipeError(f"unknown scheme {name!r}; {hint}(one of: {', '.join(PRESETS)}, auto, auto-asym)")


def named(scheme: Scheme) -> Scheme:
    """Give a scheme the name of the preset with the same numbers, or a name made of its numbers."""
    for known in PRESETS.values():
        plain = {"name": known.name, "overrides": (), "ignore": known.ignore, "kv_cache": None}
        if scheme.model_copy(update=plain) == known:
            return scheme.model_copy(update={"name": _suffixed(known.name, scheme)})
    return scheme.model_copy(update={"name": _suffixed(_name_of_numbers(scheme), scheme)})


def _name_of_numbers(scheme: Scheme) -> str:
    weights = scheme.weights
    if weights.type == "int":
        grouping = "channel" if scheme.group_size == -1 else f"g{scheme.group_size}"
        asymmetric = "" if weights.symmetric or scheme.compression == "gptq" else "-asym"
        return f"w{scheme.bits}a{scheme.activation_bits}{asymmetric}-{grouping}"
    if scheme.compression == "bitsandbytes":
        return "nf4"
    if weights.strategy == "tensor_group":
        return "nvfp4" if scheme.input_activations else "nvfp4a16"
    if weights.num_bits == 4:
        return "mxfp4"
    if scheme.input_activations is None:
        return f"fp8a16-{weights.strategy}"
    dynamic = "" if weights.strategy == "block" or scheme.input_activations.dynamic else "-static"
    return "fp8-dynamic" if weights.strategy == "channel" and not dynamic else f"fp8-{weights.strategy}{dynamic}"


def _suffixed(name: str, scheme: Scheme) -> str:
    cache = f"-kv-{scheme.kv_cache.precision}" if scheme.kv_cache else ""
    return f"{name}{cache}-mixed" if scheme.overrides else f"{name}{cache}"


def layer_schemes(scheme: Scheme) -> tuple[QuantizationScheme, ...]:
    """List how layers of a scheme are stored: those without an exception first, then those of each exception."""
    plain = QuantizationScheme(scheme.compression, scheme.weights, scheme.input_activations)
    return (plain, *(_of_override(scheme, override) for override in scheme.overrides if override.bits is not None))


def _of_override(scheme: Scheme, override: Override) -> QuantizationScheme:
    size = scheme.group_size if override.group_size is None else override.group_size
    bits = scheme.bits if override.bits is None else override.bits
    weights = grouped(bits, size, symmetric=is_symmetric(scheme, bits), actorder=scheme.weights.actorder)
    return QuantizationScheme(scheme.compression, weights, scheme.input_activations, f" ({override.modules})")


def faults(scheme: Scheme) -> list[str]:
    """Say what no supported vLLM loads of a scheme, on any engine."""
    cache = cache_scales_refusal(scheme.compression) if scheme.kv_cache else None
    if cache is not None:
        return [cache]
    mixed = [override.modules for override in scheme.overrides if override.bits is not None]
    if mixed and scheme.compression not in ("gptq", "pack-quantized"):
        return [f"{scheme.name} has no exceptions but `keep`, and {mixed[0]} asks for other numbers"]
    return [str(refusal(layer, "cuda")) for layer in layer_schemes(scheme) if not loaded_anywhere(layer)]


def nearest_loadable(scheme: Scheme) -> Scheme:
    """Change as little as makes vLLM load a scheme: enough bits, the nearest group, symmetric, no desc_act."""
    if not faults(scheme):
        return named(scheme)
    if scheme.kv_cache is not None and cache_scales_refusal(scheme.compression):
        return nearest_loadable(scheme.model_copy(update={"kv_cache": None}))
    kept = tuple(override for override in scheme.overrides if override.bits is None)
    without = scheme.model_copy(update={"overrides": kept})
    if scheme.compression != "gptq" and not faults(without):
        return named(without)
    if scheme.compression in COMPRESSED_TENSORS or (scheme.activation_bits == 8 and scheme.bits > 4):
        return named(_W8A8.model_copy(update={"overrides": kept}))
    group_size = _nearest_group(scheme.group_size)
    overrides = tuple(map(_loadable_override, scheme.overrides))
    has_groups = any(size not in (None, -1) for size in (group_size, *(each.group_size for each in overrides)))
    order = None if has_groups else scheme.weights.actorder
    changes = {
        "compression": "gptq",
        "weights": grouped(4 if scheme.bits <= 4 else 8, group_size, actorder=order),
        "input_activations": None,
        "overrides": overrides,
    }
    return named(scheme.model_copy(update=changes))


def _loadable_override(override: Override) -> Override:
    if override.group_size is None:
        return override
    return override.model_copy(update={"group_size": _nearest_group(override.group_size)})


def _nearest_group(group_size: int) -> int:
    if group_size <= 0:
        return -1
    return min(GPTQ_GROUPS[1:], key=lambda known: (abs(known - group_size), known))


def require_loadable(scheme: Scheme) -> None:
    """Raise RecipeError for a scheme that no supported vLLM loads, with the reasons and the nearest that loads."""
    reasons = faults(scheme)
    if reasons:
        raise RecipeError(
            f"scheme {scheme.name} loads nowhere: {'; '.join(reasons)}; the nearest that loads is "
            f"{_described(nearest_loadable(scheme))}",
        )


def _described(scheme: Scheme) -> str:
    weight_args = f"{scheme.bits} bits, group_size {scheme.group_size}, sym {str(scheme.sym).lower()}"
    return scheme.name if scheme.name in PRESETS else f"{scheme.name} ({weight_args})"
