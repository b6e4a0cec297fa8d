"""Modules that differ from their scheme: which bits and groups each one gets, and how a GPTQ config says so."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any

from config.manifest import Scheme
from config.quantization import QuantizationArgs, grouped

# vLLM loads these projections of a layer as one matrix, so one kernel must take all of it, and looks its rules up by
# the fused name.
FUSED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")},
)
# vLLM's kernels take zero points of these bits; other exceptions of an asymmetric scheme are symmetric.
ZERO_POINT_BITS = frozenset({4})
# All experts of a block are one module of vLLM.
_EXPERT = re.compile(r"\.experts\.\d+\.\w+$")
_LAYER = re.compile(r"^(?P<stem>.*\.)(?P<number>\d+)(?P<rest>\..*\.)(?P<leaf>[^.]+)$")


@dataclass(frozen=True, slots=True)
class WeightArgs:
    """What one module's numbers look like."""

    bits: int
    group_size: int


def quantization_args(weight_args: WeightArgs, *, zero_points: bool) -> QuantizationArgs:
    """Give the integers of one module; with `zero_points`, bits that can have them do."""
    symmetric = not zero_points or weight_args.bits not in ZERO_POINT_BITS
    return grouped(weight_args.bits, weight_args.group_size, symmetric=symmetric)


def weight_args_of(module: str, scheme: Scheme) -> WeightArgs | None:
    """Tell a module's bits and group size; None where it stays as the base has it."""
    for override in scheme.overrides:
        if fnmatchcase(module, override.modules):
            if override.bits is None:
                return None
            return WeightArgs(override.bits, scheme.group_size if override.group_size is None else override.group_size)
    return WeightArgs(scheme.bits, scheme.group_size)


def is_symmetric(scheme: Scheme, bits: int) -> bool:
    """Whether weights of these bits have no zero points in a scheme."""
    return scheme.sym or bits not in ZERO_POINT_BITS


def dynamic_rules(scheme: Scheme, layers: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Write overrides as `dynamic` of a GPTQ config: a regular expression -> what differs; `-:` leaves modules alone.

    GPTQModel looks up `q_proj`, vLLM the fused `qkv_proj`; a rule names both.
    """
    return rules_of(scheme, {module: weight_args_of(module, scheme) for module in layers})


def rules_of(scheme: Scheme, args: Mapping[str, WeightArgs | None]) -> dict[str, dict[str, Any]]:
    """Write the modules whose bits and group size are not the scheme's own as `dynamic` of a GPTQ config."""
    return {
        _rule(weight_args, pattern): _told(weight_args, scheme) for pattern, weight_args in patterns_of(scheme, args)
    }


def patterns_of(scheme: Scheme, args: Mapping[str, WeightArgs | None]) -> list[tuple[str, WeightArgs | None]]:
    """Write the modules whose bits and group size are not the scheme's own as few regular expressions."""
    plain = WeightArgs(scheme.bits, scheme.group_size)
    differing: dict[tuple[WeightArgs | None, str, str, str], list[int]] = {}
    single: list[tuple[str, WeightArgs | None]] = []
    for module, weight_args in _experts_as_one(args).items():
        if weight_args == plain:
            continue
        match = _LAYER.match(module)
        if match is None:
            single.append((module, weight_args))
        else:
            key = (weight_args, match["stem"], match["rest"], match["leaf"])
            differing.setdefault(key, []).append(int(match["number"]))
    patterns = [(re.escape(module), weight_args) for module, weight_args in single]
    for (weight_args, stem, rest, leaf), found in differing.items():
        pattern = f"{re.escape(stem)}({'|'.join(map(str, sorted(found)))}){re.escape(rest)}{_leaf_pattern(leaf)}$"
        patterns.append((pattern, weight_args))
    return patterns


def differing_modules(rules: Mapping[str, Mapping[str, Any]], module: str) -> Mapping[str, Any] | None:
    """Look a module up in `dynamic` as GPTQModel and vLLM do; {} where no rule matches, None where it is left alone."""
    for rule, changes in rules.items():
        if rule.startswith("-:"):
            if re.match(rule.removeprefix("-:"), module):
                return None
        elif re.match(rule.removeprefix("+:"), module):
            return changes
    return {}


def fused_name(module: str) -> str:
    """Give the name under which vLLM knows the matrix that a module becomes part of."""
    if _EXPERT.search(module):
        return _EXPERT.sub(".experts", module)
    parent, _, last = module.rpartition(".")
    for whole, parts in FUSED.items():
        if last in parts:
            return f"{parent}.{whole}"
    return module


def narrows(module: str, rows: int, columns: int) -> bool:
    """Whether a module [N, K] gives no more than it reads, and reads what no other does, like o and down."""
    return rows <= columns and fused_name(module) == module


def _experts_as_one(args: Mapping[str, WeightArgs | None]) -> Mapping[str, WeightArgs | None]:
    """Name the experts of a block once, where they are all alike."""
    found: dict[str, set[WeightArgs | None]] = {}
    for module, weight_args in args.items():
        if _EXPERT.search(module):
            found.setdefault(fused_name(module), set()).add(weight_args)
    alike = {name for name, different in found.items() if len(different) == 1}
    return {fused_name(module) if fused_name(module) in alike else module: value for module, value in args.items()}


def _rule(weight_args: WeightArgs | None, pattern: str) -> str:
    return f"{'-' if weight_args is None else '+'}:{pattern}"


def _told(weight_args: WeightArgs | None, scheme: Scheme) -> dict[str, Any]:
    if weight_args is None:
        return {}
    plain = {"bits": scheme.bits, "group_size": scheme.group_size, "sym": scheme.sym}
    own = {**asdict(weight_args), "sym": is_symmetric(scheme, weight_args.bits)}
    return {key: value for key, value in own.items() if value != plain[key]}


def _leaf_pattern(leaf: str) -> str:
    if leaf == "experts":
        return r"experts(\.\d+\.\w+)?"
    fused = [name for name, parts in FUSED.items() if leaf in parts]
    return f"({leaf}|{fused[0]})" if fused else re.escape(leaf)
