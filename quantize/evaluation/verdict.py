"""Limits on a variant's distance from its parent, by precision, and the verdict."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, Literal

from config.manifest import Check, Quality
from config.rules import closest
from quantize.errors import RecipeError


@dataclass(frozen=True, slots=True)
class Limits:
    """The most that passes, or for agreement and recovery the least; an increase is over the parent's own rate."""

    kl_mean: float
    top1_agreement: float
    perplexity_ratio: float
    length_ratio: float
    unfinished_increase: float
    repeating_increase: float
    unclosed_increase: float
    recovery: float
    flips: float
    fallback_modules: float = 0
    damp: float = 0.1


# Starting points from published recoveries and llama.cpp's KL scale; a family of models may need its own.
LIMITS_BY_BITS: Mapping[int, Limits] = MappingProxyType(
    {
        8: Limits(
            kl_mean=0.005,
            top1_agreement=0.98,
            perplexity_ratio=1.005,
            length_ratio=1.05,
            unfinished_increase=0.01,
            repeating_increase=0.01,
            unclosed_increase=0.01,
            recovery=0.99,
            flips=0.03,
        ),
        4: Limits(
            kl_mean=0.05,
            top1_agreement=0.93,
            perplexity_ratio=1.03,
            length_ratio=1.10,
            unfinished_increase=0.02,
            repeating_increase=0.02,
            unclosed_increase=0.02,
            recovery=0.95,
            flips=0.08,
        ),
    },
)
_AT_LEAST = frozenset({"top1_agreement", "recovery"})
# Ratios whose limit leaves so much room on the way from 1; of the others, the limit itself is the room.
_RATIOS = frozenset({"length_ratio", "recovery"})


@dataclass(frozen=True, slots=True)
class Metric:
    """A figure; where chance has a part in it, the half width of its 95 % interval."""

    name: str
    value: float
    error: float = 0.0


def limits_for(bits: int, changed: Mapping[str, float] | None = None) -> dict[str, float]:
    """The limits for the lowest bits of a scheme, some of them changed; RecipeError for a name there is none of."""
    limits = asdict(LIMITS_BY_BITS[4 if bits <= 4 else 8])
    for name, value in (changed or {}).items():
        if name not in limits:
            raise RecipeError(f"limit {name}: there is no such limit; {closest(name, limits)}")
        if not math.isfinite(value):
            raise RecipeError(f"limit {name}: {value} is no limit; give a finite number")
    return {**limits, **(changed or {})}


def judge(
    figures: Mapping[str, Any],
    bits: int,
    dataset_sha256: str,
    limits: Mapping[str, float] | None = None,
    *,
    errors: Mapping[str, float] | None = None,
    modules: Mapping[str, float] | None = None,
) -> Quality:
    """Hold measured figures against the limits for `bits`, some of them changed by `limits`.

    `figures` go by the names of Quality; `errors` are 95 % half widths of what few generations or questions measure;
    `modules` are figures of the quantized modules. A figure with an error counts only if it can: if its error is no
    larger than the room that its limit leaves, or if it misses the limit by more than its error. Otherwise there
    is no check of that name, rather than one that a coin decides.
    """
    allowed = limits_for(bits, limits)
    measured = [*_of_tokens(figures), *_of_texts(figures, errors or {}), *_of_answers(figures, errors or {})]
    measured += [Metric(name, value) for name, value in (modules or {}).items()]
    checks = tuple(_check(one, allowed[one.name]) for one in measured if is_conclusive(one, allowed[one.name]))
    verdict: Literal["pass", "fail"] = "pass" if all(check.passed for check in checks) else "fail"
    return Quality(**figures, dataset_sha256=dataset_sha256, checks=checks, verdict=verdict)


def is_conclusive(measured: Metric, limit: float) -> bool:
    """Tell whether a figure is sure enough to be held against a limit."""
    room = abs(limit - 1) if measured.name in _RATIOS else limit
    missed_by = limit - measured.value if measured.name in _AT_LEAST else measured.value - limit
    return measured.error == 0 or measured.error <= room or missed_by > measured.error


def _of_tokens(figures: Mapping[str, Any]) -> Iterator[Metric]:
    for name in ("kl_mean", "top1_agreement", "perplexity_ratio"):
        yield Metric(name, figures[name])


def _of_texts(figures: Mapping[str, Any], errors: Mapping[str, float]) -> Iterator[Metric]:
    generation = figures.get("generation")
    if not generation:
        return
    yield Metric("length_ratio", generation["length_ratio"], errors["length_ratio"])
    for rate in ("unfinished", "repeating", "unclosed"):
        name = f"{rate}_increase"
        yield Metric(name, generation[rate] - generation[f"parent_{rate}"], errors[name])


def _of_answers(figures: Mapping[str, Any], errors: Mapping[str, float]) -> Iterator[Metric]:
    if tasks := figures.get("tasks"):
        yield Metric("recovery", tasks["recovery"], errors["recovery"])
        yield Metric("flips", tasks["flips"], errors["flips"])


def _check(measured: Metric, limit: float) -> Check:
    value = measured.value
    passed = value >= limit if measured.name in _AT_LEAST else value <= limit
    return Check(name=measured.name, value=value, limit=limit, passed=passed)
