"""What a search gives numbers to: matrices as vLLM loads them, what each may get, and a scheme that says so. Pure."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from os.path import commonprefix
from typing import Any, Literal, TypeVar

from config.manifest import Engine, Override, Scheme
from quantize.errors import RecipeError
from quantize.schemes.engines import choices
from quantize.schemes.fit import Heads, Shapes, uneven_share
from quantize.schemes.module_config import WeightArgs, fused_name, quantization_args

_Value = TypeVar("_Value")
_NUMBER = re.compile(r"\.\d+\.")


@dataclass(frozen=True, slots=True)
class ModuleGroup:
    """Modules that share their numbers, since vLLM loads them as one matrix; `choices` has the smallest file first."""

    name: str
    modules: tuple[str, ...]
    choices: tuple[WeightArgs, ...]


def module_groups_of(
    shapes: Shapes,
    engine: Engine,
    overrides: Sequence[Override] = (),
    *,
    zero_points: bool = False,
    tensor_parallel: int = 1,
    heads: Heads | None = None,
) -> tuple[ModuleGroup, ...]:
    """Split linear layers into units; those that an override keeps are in none, those it gives numbers have one choice.

    RecipeError: an override tells the parts of a unit apart, an engine has nothing that fits a unit, or all is kept.
    """
    members: dict[str, list[str]] = {}
    for module in shapes:
        members.setdefault(fused_name(module), []).append(module)
    found = []
    for name, modules in members.items():
        override = _common_override(modules, overrides)
        if override is None or override.bits is not None:
            own = {module: shapes[module] for module in modules}
            may = tuple(
                weight_args
                for weight_args in _choices(own, engine, override, zero_points=zero_points)
                if uneven_share(own, uniform_scheme(weight_args, zero_points=zero_points), tensor_parallel, heads)
                is None
            )
            if not may:
                raise RecipeError(f"{name}: nothing that loads on engine {engine} fits it{_where(override)}")
            found.append(ModuleGroup(name, tuple(modules), may))
    if not found:
        raise RecipeError("scheme auto has nothing to choose: the overrides keep all linear layers; keep fewer")
    return tuple(found)


def kinds_of(module_groups: Sequence[ModuleGroup]) -> dict[str, tuple[ModuleGroup, ...]]:
    """Name the kinds of units: those that differ in the number of their layer alone, and may have the same numbers."""
    kinds: dict[tuple[str, tuple[WeightArgs, ...]], list[ModuleGroup]] = {}
    for group in module_groups:
        kinds.setdefault((_in_any_layer(group.name), group.choices), []).append(group)
    return {f"{name}, kind {number}": tuple(groups) for number, ((name, _), groups) in enumerate(kinds.items())}


def uniform_scheme(weight_args: WeightArgs, overrides: Iterable[Override] = (), *, zero_points: bool = False) -> Scheme:
    """Give the scheme that a search writes its numbers into; with `zero_points` 4 bits have them."""
    return Scheme(
        name="auto-asym" if zero_points else "auto",
        compression="pack-quantized" if zero_points else "gptq",
        weights=quantization_args(weight_args, zero_points=zero_points),
        overrides=tuple(overrides),
    )


def written(
    module_groups: Sequence[ModuleGroup],
    chosen: Mapping[str, WeightArgs],
    modules: Sequence[str],
    *,
    zero_points: bool = False,
) -> Scheme:
    """Write the units' numbers as a scheme for all `modules`; those in no unit are kept as the base has them.

    Its own numbers are the fewest bits and the commonest group. What differs is an override: first single units,
    then what most units of a kind have.
    """
    weight_args = [chosen[module_group.name] for module_group in module_groups]
    plain = WeightArgs(
        min(choice.bits for choice in weight_args), _commonest([choice.group_size for choice in weight_args])
    )
    single: list[Override] = []
    general: list[Override] = []
    for kind in _kinds(module_groups, chosen, modules):
        usual = _commonest([*kind.values()], first=plain)
        pattern = _kind_pattern(kind, modules) if usual != plain else None
        if pattern:
            general.append(_override(pattern, usual))
        expected = usual if pattern else plain
        single += [
            _override(pattern, given)
            for members, given in kind.items()
            if given != expected
            for pattern in _patterns(members, modules)
        ]
    return uniform_scheme(plain, [*single, *general], zero_points=zero_points)


_Members = tuple[str, ...]


def _choices(shapes: Shapes, engine: Engine, override: Override | None, *, zero_points: bool) -> list[WeightArgs]:
    if override and override.bits and override.group_size is not None:
        return [WeightArgs(override.bits, override.group_size)]
    every = [choices(engine, shape, channels=True, zero_points=zero_points) for shape in shapes.values()]
    common = [weight_args for weight_args in every[0] if all(weight_args in other for other in every)]
    if override is None:
        return common
    return [one for one in common if one.bits == override.bits and one.group_size > 0][:1]


def _common_override(modules: Sequence[str], overrides: Sequence[Override]) -> Override | None:
    found = [next((one for one in overrides if fnmatchcase(module, one.modules)), None) for module in modules]
    for module, one in zip(modules, found, strict=True):
        if one != found[0]:
            pattern = (one or found[0] or overrides[0]).modules
            raise RecipeError(
                f"override {pattern!r} tells {modules[0]} and {module} apart, which vLLM loads as one matrix; "
                "write a pattern that matches both"
            )
    return found[0]


def _where(override: Override | None) -> str:
    return f", or override {override.modules!r} asks for too much" if override else ""


def _kinds(
    module_groups: Sequence[ModuleGroup], chosen: Mapping[str, WeightArgs], modules: Sequence[str]
) -> list[dict[_Members, WeightArgs | None]]:
    """Group units that differ in the number of their layer alone."""
    assigned: dict[_Members, WeightArgs | None] = {
        module_group.modules: chosen[module_group.name] for module_group in module_groups
    }
    searched = {module for module_group in module_groups for module in module_group.modules}
    kept: dict[str, list[str]] = {}
    for module in modules:
        if module not in searched:
            kept.setdefault(fused_name(module), []).append(module)
    assigned |= {tuple(members): None for members in kept.values()}
    kinds: dict[_Members, dict[_Members, WeightArgs | None]] = {}
    for members, weight_args in assigned.items():
        kinds.setdefault(tuple(map(_in_any_layer, members)), {})[members] = weight_args
    return [*kinds.values()]


def _kind_pattern(kind: Mapping[_Members, Any], modules: Sequence[str]) -> str | None:
    """Find a pattern that matches a kind's modules and no other; None for a kind of one unit."""
    wanted = {module for members in kind for module in members}
    first = next(iter(kind))
    patterns = [_in_any_layer(pattern) for pattern in _patterns(first, modules)]
    return patterns[0] if len(kind) > 1 and len(patterns) == 1 and _matched(patterns[0], modules) == wanted else None


def _patterns(members: _Members, modules: Sequence[str]) -> list[str]:
    """Write a unit's modules as one shell pattern that matches no other module, or else each by its name."""
    if len(members) == 1:
        return [members[0]]
    start = commonprefix(members)  # noqa: RUF071 - names, letter by letter
    end = commonprefix([member[len(start) :][::-1] for member in members])[::-1]  # noqa: RUF071
    letters = "".join(sorted({member[len(start)] for member in members}))
    for pattern in (f"{start}[{letters}]{end}", f"{start}[{letters}]*{end}"):
        if _matched(pattern, modules) == set(members):
            return [pattern]
    return [*members]


def _matched(pattern: str, modules: Sequence[str]) -> set[str]:
    return {module for module in modules if fnmatchcase(module, pattern)}


def _in_any_layer(name: str) -> str:
    return _NUMBER.sub(".*.", name, count=1)


def _commonest(values: Sequence[_Value], first: _Value | None = None) -> _Value:
    """The commonest value; of several, `first` if it is one of them, else the one that comes first."""
    counts = Counter(values)
    return max(counts, key=lambda value: (counts[value], value == first))


def _override(pattern: str, weight_args: WeightArgs | None) -> Override:
    if weight_args is None:
        return Override(modules=pattern)
    bits: Literal[4, 8] = 4 if weight_args.bits == 4 else 8
    return Override(modules=pattern, bits=bits, group_size=weight_args.group_size)
