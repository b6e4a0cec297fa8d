"""Limits on a variant's distance from its parent, by precision, and the verdict."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType

from config.estimates import Estimate, more_units
from config.measurements import Measurements
from config.quality import Check, Interval, Quality, Verdict
from config.rules import closest
from quantize.errors import RecipeError
from quantize.evaluation.figures import (
    completion_figures,
    generation,
    restricted,
    task_figures,
    tasks_of,
    token_figures,
)


@dataclass(frozen=True, slots=True)
class Limits:
    """What the worse end of a figure's interval must not exceed, or for agreement and recovery not fall below.

    An increase is over the parent's own rate.
    """

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


# Guesses: kl_mean, top1_agreement and perplexity_ratio from published recoveries and llama.cpp's KL scale. The others
# leave a variant equal to its parent room for chance: 96 pairs without an event show an increase below 0.04. A family
# of models may need its own.
LIMITS_BY_BITS: Mapping[int, Limits] = MappingProxyType(
    {
        8: Limits(
            kl_mean=0.005,
            top1_agreement=0.98,
            perplexity_ratio=1.005,
            length_ratio=1.15,
            unfinished_increase=0.05,
            repeating_increase=0.05,
            unclosed_increase=0.05,
            recovery=0.97,
            flips=0.05,
        ),
        4: Limits(
            kl_mean=0.05,
            top1_agreement=0.93,
            perplexity_ratio=1.03,
            length_ratio=1.25,
            unfinished_increase=0.10,
            repeating_increase=0.10,
            unclosed_increase=0.10,
            recovery=0.93,
            flips=0.10,
        ),
    },
)
_AT_LEAST = frozenset({"top1_agreement", "recovery"})
# Figures of a manifest that floors can be about, beside those of the checks.
_FLOORS = ("kl_mean", "top1_agreement", "perplexity_ratio", "kl_p99", "length_ratio")


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
    measured: Measurements,
    bits: int,
    dataset_sha256: str,
    limits: Mapping[str, float] | None = None,
    *,
    modules: Mapping[str, float] | None = None,
) -> Quality:
    """Hold estimates against the limits for `bits`, some of them changed by `limits`.

    `modules` are figures of the quantized modules, which are counted and have no interval. The verdict is "fail" if a
    check failed, else "not shown" if one could not be decided, else "pass".
    """
    allowed = limits_for(bits, limits)
    figures = token_figures(measured.chats)
    if measured.completions:
        figures |= completion_figures(measured.completions)
    if measured.tasks:
        figures |= task_figures(measured.tasks)
    checks = [check(name, estimate, allowed[name]) for name, estimate in figures.items()]
    checks += [check(name, Estimate(value, value, value, 1), allowed[name]) for name, value in (modules or {}).items()]
    p99 = measured.kl_p99
    figures["kl_p99"] = Estimate(p99.value, p99.low, p99.high, len(measured.chats))
    return quality_of(measured, figures, dataset_sha256, checks)


def check(name: str, estimate: Estimate, limit: float) -> Check:
    """Hold one estimate against its limit; values that meet the limit exactly pass."""
    at_least = name in _AT_LEAST
    worse, better = (estimate.low, estimate.high) if at_least else (estimate.high, estimate.low)
    met = (worse >= limit) if at_least else (worse <= limit)
    missed = (better < limit) if at_least else (better > limit)
    verdict: Verdict = "pass" if met else "fail" if missed else "not shown"
    return Check(
        name=name,
        value=estimate.value,
        limit=limit,
        passed=met,
        interval=None if estimate.low == estimate.high else interval_of(estimate),
        verdict=verdict,
        more_chats=more_units(estimate, limit) if verdict == "not shown" else None,
    )


def verdict_of(checks: list[Check]) -> Verdict:
    """Return the worst verdict of the checks."""
    found = {one.verdict for one in checks}
    return "fail" if "fail" in found else "not shown" if "not shown" in found else "pass"


def quality_of(
    measured: Measurements, figures: Mapping[str, Estimate], dataset_sha256: str, checks: list[Check]
) -> Quality:
    """Put figures, intervals and checks together as a manifest has them."""
    chats = measured.chats
    every = [chat for chat in chats if chat.generated.tokens]
    ratio = figures["length_ratio"].value if "length_ratio" in figures else None
    return Quality(
        dataset_sha256=dataset_sha256,
        tokens=sum(chat.generated.tokens for chat in every),
        chats=len(every),
        method=measured.method,
        top_k=measured.top_k,
        longest_position=max(chat.positions for chat in chats),
        kl_floor=measured.kl_floor,
        intervals={name: interval_of(figures[name]) for name in _FLOORS if name in figures},
        kl_mean=figures["kl_mean"].value,
        kl_p99=figures["kl_p99"].value,
        top1_agreement=figures["top1_agreement"].value,
        perplexity_ratio=figures["perplexity_ratio"].value,
        length_ratio=ratio,
        prompt=restricted([chat.prompt for chat in chats]),
        reasoning=restricted([chat.reasoning for chat in chats]),
        answer=restricted([chat.answer for chat in chats]),
        generation=None if ratio is None else generation(measured, ratio),
        tasks=tasks_of(measured.tasks) if measured.tasks else None,
        checks=tuple(checks),
        verdict=verdict_of(checks),
    )


def interval_of(estimate: Estimate) -> Interval:
    """Give an interval as a manifest has it: None for an end that is infinite."""
    low, high = (end if math.isfinite(end) else None for end in (estimate.low, estimate.high))
    return Interval(low=low, high=high)
