"""What the solver's log says about the modules: fallbacks, damping, and losses that stand out."""

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from quantize.variants.quant_log import quant_log_file

# GPTQ's loss grows a thousandfold with depth, so a module is held against those of its kind around it.
_NEIGHBOURS = 4
_OUTLIER_FACTOR = 10
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def read_modules(variant: Path) -> list[dict[str, Any]]:
    """Read the modules of a variant's quant log; an empty list if it has none."""
    path = quant_log_file(variant)
    return list(json.loads(path.read_bytes())["modules"]) if path.is_file() else []


def module_figures(modules: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Figures to hold against limits: modules rounded to nearest, and the largest damping."""
    if not modules:
        return {}
    damps = [module["damp"] for module in modules if module["damp"] is not None and not module["fallback"]]
    return {"fallback_modules": sum(module["fallback"] for module in modules), "damp": max(damps, default=0.0)}


def loss_outliers(modules: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """List modules whose loss is more than ten times the median of their kind in the four layers before and after.

    For the eye, not for the verdict: a few layers with huge activations stand out in healthy models, too.
    """
    kinds: dict[str, list[tuple[int, Mapping[str, Any]]]] = defaultdict(list)
    for module in modules:
        number = _NUMBER.search(module["module"])
        if number and module["loss"] is not None:
            kinds[_NUMBER.sub("*", module["module"], count=1)].append((int(number[0]), module))
    return [outlier for group in kinds.values() for outlier in _outliers(sorted(group, key=lambda one: one[0]))]


def _outliers(group: Sequence[tuple[int, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    found = []
    for place, (_, module) in enumerate(group):
        around = group[max(0, place - _NEIGHBOURS) : place + _NEIGHBOURS + 1]
        usual = median(other["loss"] for _, other in around)
        if module["loss"] > _OUTLIER_FACTOR * usual:
            found.append({"module": module["module"], "loss": module["loss"], "usual": usual})
    return found
