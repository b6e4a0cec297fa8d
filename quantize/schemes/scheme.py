"""Schemes are data: named presets, exceptions by module, and what vLLM loads of them."""

from collections.abc import Mapping
from difflib import get_close_matches
from types import MappingProxyType

from config.manifest import Override, Scheme
from quantize.errors import RecipeError


def _gptq(name: str, bits: int, group_size: int) -> Scheme:
    return Scheme(
        name=name,
        bits=bits,
        group_size=group_size,
        sym=True,
        desc_act=False,
        activation_bits=16,
        format="gptq",
    )


_W8A8 = Scheme(
    name="w8a8",
    bits=8,
    group_size=-1,
    sym=True,
    desc_act=False,
    activation_bits=8,
    format="compressed-tensors",
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
        )
    },
)

# What vLLM 0.32's GPTQ loader takes; everything else is a ValueError when the server starts.
GPTQ_BITS = (4, 8)
GPTQ_GROUPS = (-1, 32, 64, 128)


def preset(name: str) -> Scheme:
    """Look a scheme up by name; RecipeError proposes the nearest name."""
    if name in PRESETS:
        return PRESETS[name]
    near = get_close_matches(name, PRESETS, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}? " if near else ""
    raise RecipeError(f"unknown scheme {name!r}; {hint}(one of: {', '.join(PRESETS)}, auto)")


def named(scheme: Scheme) -> Scheme:
    """Give a scheme the name of the preset with the same numbers, or a name made of its numbers."""
    for known in PRESETS.values():
        if scheme.model_copy(update={"name": known.name, "overrides": ()}) == known:
            return scheme.model_copy(update={"name": _suffixed(known.name, scheme)})
    grouping = "channel" if scheme.group_size == -1 else f"g{scheme.group_size}"
    return scheme.model_copy(
        update={"name": _suffixed(f"w{scheme.bits}a{scheme.activation_bits}-{grouping}", scheme)},
    )


def _suffixed(name: str, scheme: Scheme) -> str:
    return f"{name}-mixed" if scheme.overrides else name


def faults(scheme: Scheme) -> list[str]:
    """Say what no vLLM from 0.32 on loads of a scheme, on any engine."""
    if scheme.format == "compressed-tensors":
        return _w8a8_faults(scheme)
    problems = []
    if scheme.bits not in GPTQ_BITS:
        problems.append(f"vLLM loads GPTQ of 4 or 8 bits, not of {scheme.bits}")
    if scheme.group_size not in GPTQ_GROUPS:
        problems.append(f"vLLM loads groups of 32, 64, 128 or -1 (all inputs), not of {scheme.group_size}")
    if not scheme.sym:
        problems.append("vLLM loads symmetric GPTQ only")
    if scheme.desc_act and scheme.group_size != -1:
        problems.append("vLLM no longer loads GPTQ with desc_act and groups")
    if scheme.activation_bits != 16:
        problems.append(f"GPTQ's format has 16-bit activations, not {scheme.activation_bits}-bit ones")
    return problems + [fault for override in scheme.overrides if (fault := _override_fault(override))]


def _w8a8_faults(scheme: Scheme) -> list[str]:
    problems = []
    if scheme.model_copy(update={"name": "w8a8", "overrides": ()}) != _W8A8:
        problems.append("compressed-tensors is written as w8a8: symmetric, 8-bit weights by channel, 8-bit activations")
    mixed = [override.modules for override in scheme.overrides if override.bits is not None]
    if mixed:
        problems.append(f"w8a8 has no exceptions but `keep`, and {mixed[0]} asks for other numbers")
    return problems


def _override_fault(override: Override) -> str:
    if override.bits is None or override.group_size is None or override.group_size in GPTQ_GROUPS:
        return ""
    return f"vLLM loads groups of 32, 64, 128 or -1, and {override.modules} asks for {override.group_size}"


def nearest_loadable(scheme: Scheme) -> Scheme:
    """Change as little as makes vLLM load a scheme: enough bits, the nearest group, symmetric, no desc_act."""
    if scheme.format == "compressed-tensors" or (scheme.activation_bits == 8 and scheme.bits > 4):
        kept = tuple(override for override in scheme.overrides if override.bits is None)
        return named(_W8A8.model_copy(update={"overrides": kept}))
    group_size = _nearest_group(scheme.group_size)
    changes = {
        "bits": 4 if scheme.bits <= 4 else 8,
        "group_size": group_size,
        "sym": True,
        "desc_act": scheme.desc_act and group_size == -1,
        "activation_bits": 16,
        "overrides": tuple(map(_loadable_override, scheme.overrides)),
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
    """Raise RecipeError for a scheme that no vLLM from 0.32 on loads, with the reasons and the nearest that loads."""
    reasons = faults(scheme)
    if reasons:
        raise RecipeError(
            f"scheme {scheme.name} loads nowhere: {'; '.join(reasons)}; the nearest that loads is "
            f"{_told(nearest_loadable(scheme))}",
        )


def _told(scheme: Scheme) -> str:
    weight_args = f"{scheme.bits} bits, group_size {scheme.group_size}, sym {str(scheme.sym).lower()}"
    return scheme.name if scheme.name in PRESETS else f"{scheme.name} ({weight_args})"
