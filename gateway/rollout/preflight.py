"""Checks before a rollout: the plan fits the configuration, and the new variant is measured to be good enough."""

import asyncio
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from config.errors import ManifestError
from config.measurements import read_measurements
from config.paired_comparison import PairedComparison, compare_paired
from config.quality import Quality
from config.schema import AliasSettings
from config.variant import Variant
from gateway.rollout.plan import QualityBudget, RolloutPlan

# Compares the measured quality of the old variant and the new one, on the same held-out text; returns the problems.
Comparison = Callable[[Variant, Variant, QualityBudget], tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Preflight:
    """What preflight looks at; `compare` is the paired comparison of two variants."""

    variants: Mapping[str, Variant]
    aliases: Mapping[str, AliasSettings]
    compare: Comparison

    async def problems(self, plan: RolloutPlan) -> tuple[str, ...]:
        """Return why a rollout must not go on; empty: it may. Reads every byte of the new variant, in a thread."""
        found = plan_problems(plan, self.variants, self.aliases, self.compare)
        new = self.variants.get(plan.new)
        if found or new is None or new.manifest is None or new.path is None:
            return found
        altered = await asyncio.to_thread(new.manifest.altered_files, new.path)
        return tuple(f"{plan.new}: checksum mismatch: {new.path / name}" for name in altered)


def plan_problems(
    plan: RolloutPlan, variants: Mapping[str, Variant], aliases: Mapping[str, AliasSettings], compare: Comparison
) -> tuple[str, ...]:
    """Return what is wrong with a plan, as far as configuration and manifests say."""
    alias, new, old = aliases.get(plan.alias), variants.get(plan.new), variants.get(plan.old)
    if alias is None:
        return (f"{plan.alias}: there is no such alias in the configuration",)
    if missing := [name for name in {*plan.canary, *plan.final} if name not in variants]:
        return tuple(f"{name}: there is no such variant in the configuration" for name in sorted(missing))
    assert new is not None
    assert old is not None
    if outside := [variant.name for variant in (old, new) if variant.is_external]:
        return tuple(f"{name}: is an external model, which has no replicas to roll out" for name in outside)
    if fingerprint(new) != plan.fingerprint:
        return (f"{plan.new}: its content has changed since the rollout was started; `retry` takes the new one",)
    problems = []
    if new.manifest is not None and new.manifest.quality.verdict != "pass" and not alias.admit_failed:
        reason = new.failure or "its verdict is not shown: evaluate it on more chats, or set admit_failed"
        problems.append(f"{plan.new}: {reason}")
    trusted = alias.trust_declared
    if (shortfall := new.quality.shortfall(alias.floor, trust_declared=trusted)) is not None:
        problems.append(f"{plan.new} does not meet the floor of {plan.alias}: {shortfall}")
    if plan.settings.compare and old.manifest is not None and new.manifest is not None:
        problems += compare(old, new, plan.settings.budget)
    return tuple(problems)


def compare_quality(old: Variant, new: Variant, budget: QualityBudget) -> tuple[str, ...]:
    """Compare two variants of one parent on the same held-out text, chat by chat; return what is not shown to fit.

    The worse end of the 95 % interval of each difference must fit the budget. Variants whose chats were not kept are
    compared by their figures.
    """
    assert old.manifest is not None
    assert new.manifest is not None
    before, after = old.manifest, new.manifest
    if before.base.digest != after.base.digest:
        return (f"{new.name} has another base than {old.name}; `compare: false` in the plan skips the comparison",)
    try:
        measured = [read_measurements(variant.path) if variant.path else None for variant in (old, new)]
    except ManifestError as error:
        return (str(error),)
    paired = compare_paired(measured[0], measured[1]) if measured[0] and measured[1] else None
    if paired is not None:
        return tuple(_paired_problems(old.name, new.name, paired, budget))
    if before.quality.dataset_sha256 != after.quality.dataset_sha256:
        return (f"{new.name} was measured on another text than {old.name}: measure both with `quantgate evaluate`",)
    return tuple(_figure_problems(old.name, new.name, before.quality, after.quality, budget))


def _paired_problems(old: str, new: str, paired: PairedComparison, budget: QualityBudget) -> Iterator[str]:
    by_figure = {row.figure: row.difference for row in paired.differences}
    ratio = by_figure["excess_nll"]
    worse = {
        "kl_mean": (by_figure["kl_mean"].value, by_figure["kl_mean"].high, budget.kl_mean),
        "top1_agreement": (-by_figure["top1_agreement"].value, -by_figure["top1_agreement"].low, budget.top1_agreement),
        "perplexity_ratio": (math.expm1(ratio.value), math.expm1(min(ratio.high, 700.0)), budget.perplexity_ratio),
    }
    for figure, (value, bound, limit) in worse.items():
        if bound > limit:
            yield (
                f"{new}: {figure} is worse than that of {old} by {value:.4g}, at most {bound:.4g} with 95 % confidence "
                f"on {paired.chats} chats; the budget is {limit:.4g}"
            )


def _figure_problems(old: str, new: str, before: Quality, after: Quality, budget: QualityBudget) -> Iterator[str]:
    worse = {
        "kl_mean": (after.kl_mean - before.kl_mean, budget.kl_mean),
        "top1_agreement": (before.top1_agreement - after.top1_agreement, budget.top1_agreement),
        "perplexity_ratio": (after.perplexity_ratio - before.perplexity_ratio, budget.perplexity_ratio),
    }
    for figure, (by, limit) in worse.items():
        if by > limit:
            yield f"{new}: {figure} is worse than that of {old} by {by:.4g}, the budget is {limit:.4g}"


def fingerprint(variant: Variant) -> str:
    """Identify the content of a variant: by its sealed files, else by what the configuration says of it."""
    if variant.manifest is not None:
        files = sorted((name, file.sha256) for name, file in variant.manifest.files.items())
        return hashlib.sha256(repr((variant.manifest.id, files)).encode()).hexdigest()[:16]
    return hashlib.sha256(repr((variant.name, variant.precision, str(variant.path))).encode()).hexdigest()[:16]
