"""A recipe file: found by path or by the name of a shipped one, read, and held against its rules with line numbers."""

from collections.abc import Iterator, Mapping
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from config.errors import SettingsError
from config.load import load_file
from config.manifest import Scheme
from config.rules import Location, Violation, closest
from config.vllm import GPTQ_BITS
from quantize.errors import RecipeError, RecipeFileError
from quantize.evaluation.verdict import Limits
from quantize.planning.recipe_schema import OverrideTable, RecipeFile, SchemeTable
from quantize.schemes.cache_scales import FP8_CACHE
from quantize.schemes.scheme import PRESETS, faults, named, nearest_loadable

# Schemes that a search finds: without and with zero points.
AUTO, AUTO_ASYMMETRIC = "auto", "auto-asym"
SEARCHED = (AUTO, AUTO_ASYMMETRIC)
_SHIPPED = Path(__file__).parents[1] / "recipes"


def load_recipe(name: str) -> RecipeFile:
    """Read a recipe by path or shipped name; its relative paths count from its folder.

    RecipeFileError lists every problem as file:line:col: path: problem; hint.
    """
    path = find_recipe(name)
    try:
        return load_file(path, RecipeFile, violations).rooted(path.parent)
    except SettingsError as error:
        raise RecipeFileError([str(problem) for problem in error.problems]) from None


def find_recipe(name: str) -> Path:
    """Take a name for a file if there is one, or for a shipped recipe if it has no folder in it."""
    path = Path(name)
    if path.is_file():
        return path
    known = {file.stem: file for file in shipped_recipes()}
    if path.parent != Path() or "/" in name:
        raise RecipeError(f"{name}: no such recipe file")
    stem = name.removesuffix(".yaml")
    if stem in known:
        return known[stem]
    near = get_close_matches(stem, known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise RecipeError(f"{name}: no such recipe file, and no shipped recipe; {hint}(shipped: {', '.join(known)})")


def shipped_recipes() -> list[Path]:
    """List the recipes that come with this package."""
    return sorted(_SHIPPED.glob("*.yaml"))


def purpose_of(recipe: Path) -> str:
    """Give the first line of a recipe's opening comment."""
    with recipe.open(encoding="utf-8") as lines:
        return next(lines, "").removeprefix("#").strip()


def limit_names() -> list[str]:
    """List the figures that a gate can limit."""
    return [field.name for field in fields(Limits)]


def scheme_of(table: SchemeTable) -> Scheme:
    """Turn a table that passed its rules into a scheme, with its preset's numbers where it says none."""
    values = table.model_dump(exclude_none=True, exclude={"preset", "kv_cache"})
    cache = {"kv_cache": FP8_CACHE if table.kv_cache == "fp8" else None}
    if table.preset is not None:
        return named(_with_first_keys(PRESETS[table.preset], values).model_copy(update=cache))
    integers = values.get("activation_bits") == 8
    defaults = {
        "name": "",
        "sym": True,
        "desc_act": False,
        "activation_bits": 8 if values.get("format") == "compressed-tensors" else 16,
        "format": "compressed-tensors" if integers else "gptq",
    }
    return named(Scheme.model_validate({**defaults, **values}).model_copy(update=cache))


def _with_first_keys(scheme: Scheme, values: Mapping[str, Any]) -> Scheme:
    """Replace numbers of a scheme by those of a table, which has the keys of manifests before compressed-tensors'."""
    if not values:
        return scheme
    keys = ("bits", "group_size", "sym", "desc_act", "activation_bits", "format")
    first = {key: getattr(scheme, key) for key in keys}
    return Scheme.model_validate({**first, **values, "name": scheme.name, "overrides": scheme.overrides})


def violations(recipe: RecipeFile) -> list[Violation]:
    """List every rule that a recipe breaks, in the order of the file."""
    return [*_scheme(recipe), *_overrides(recipe.overrides), *_numbers(recipe), *_limits(recipe)]


def _scheme(recipe: RecipeFile) -> Iterator[Violation]:
    table = recipe.scheme
    budgets = [name for name in ("max_bytes", "max_kl") if getattr(recipe, name) is not None]
    if table is not None and table.preset not in SEARCHED:
        yield from _fixed_scheme(table)
        for name in budgets:
            yield Violation((name,), "is a budget, and this scheme is fixed", "write `scheme: auto`, or remove it")
    elif table is not None and table.model_fields_set != {"preset"}:
        yield Violation(("scheme",), f"{table.preset} chooses the numbers itself", "remove them, or write a preset")
    if len(budgets) == 2:
        yield Violation(("max_kl",), "beside max_bytes: one of the two is the budget", "keep one")


def _fixed_scheme(table: SchemeTable) -> Iterator[Violation]:
    if table.preset is not None and table.preset not in PRESETS:
        near = closest(table.preset, [*PRESETS, *SEARCHED])
        yield Violation(("scheme",), f"there is no scheme {table.preset!r}", near)
        return
    missing = [name for name in ("bits", "group_size") if table.preset is None and getattr(table, name) is None]
    yield from (Violation(("scheme", name), "is missing") for name in missing)
    if not missing:
        scheme = scheme_of(table)
        hint = f"the nearest that loads is {nearest_loadable(scheme).name}"
        yield from (Violation(("scheme",), fault, hint) for fault in faults(scheme))


def _overrides(overrides: tuple[OverrideTable, ...]) -> Iterator[Violation]:
    for index, one in enumerate(overrides):
        where: Location = ("overrides", index)
        if one.keep and (one.bits is not None or one.group_size is not None):
            yield Violation((*where, "keep"), "beside numbers", "keep these modules, or give them numbers")
        if not one.keep and one.bits is None and one.group_size is None:
            yield Violation(where, "says nothing about its modules", "write bits, group_size or `keep: true`")
        if one.bits is not None and one.bits not in GPTQ_BITS:
            yield Violation((*where, "bits"), f"vLLM loads 4 and 8 bits, not {one.bits}")


def _numbers(recipe: RecipeFile) -> Iterator[Violation]:
    for index, damp in enumerate(recipe.solver.damp or ()):
        if not 0 < damp < 1:
            yield Violation(("solver", "damp", index), f"{damp:g} is no share", "write a number between 0 and 1")
    gpus = recipe.devices.gpus
    for index, gpu in enumerate(gpus):
        if gpu in gpus[:index]:
            yield Violation(("devices", "gpus", index), f"GPU {gpu} is named twice", "remove one")


def _limits(recipe: RecipeFile) -> Iterator[Violation]:
    known = limit_names()
    for name in recipe.evaluation.limits:
        if name not in known:
            yield Violation(("evaluation", "limits", name), "is no figure with a limit", closest(name, known))
