"""Checks before a rollout: the plan fits the configuration, and the new variant is measured to be good enough."""

import asyncio
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from config.manifest import Manifest
from config.schema import AliasSettings
from config.variant import Variant
from gateway.rollout.plan import QualityBudget, RolloutPlan

# Compares the measured quality of the old variant and the new one, on the same held-out text; returns the problems.
Comparison = Callable[[Manifest, Manifest, QualityBudget], tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Preflight:
    """What preflight looks at; `compare` is the paired comparison of two manifests."""

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
    if fingerprint(new) != plan.fingerprint:
        return (f"{plan.new}: its content has changed since the rollout was started; `retry` takes the new one",)
    problems = []
    if new.failure is not None and not alias.admit_failed:
        problems.append(f"{plan.new}: {new.failure}")
    trusted = alias.trust_declared
    if (shortfall := new.quality.shortfall(alias.floor, trust_declared=trusted)) is not None:
        problems.append(f"{plan.new} does not meet the floor of {plan.alias}: {shortfall}")
    if plan.settings.compare and old.manifest is not None and new.manifest is not None:
        problems += compare(old.manifest, new.manifest, plan.settings.budget)
    return tuple(problems)


def compare_manifests(old: Manifest, new: Manifest, budget: QualityBudget) -> tuple[str, ...]:
    """Compare two measurements by their bounds; they must have been made on the same text of the same parent."""
    if old.base.digest != new.base.digest:
        return (
            f"{new.id} was made from another base than {old.id}; `compare: false` in the plan skips the comparison",
        )
    if old.quality.dataset_sha256 != new.quality.dataset_sha256:
        return (f"{new.id} was measured on another text than {old.id}: measure both with `quantgate evaluate`",)
    worse = {
        "kl_mean": (new.quality.kl_mean - old.quality.kl_mean, budget.kl_mean),
        "top1_agreement": (old.quality.top1_agreement - new.quality.top1_agreement, budget.top1_agreement),
        "perplexity_ratio": (new.quality.perplexity_ratio - old.quality.perplexity_ratio, budget.perplexity_ratio),
    }
    return tuple(
        f"{new.id}: {name} is worse than that of {old.id} by {by:.4g}, the budget is {limit:.4g}"
        for name, (by, limit) in worse.items()
        if by > limit
    )


def fingerprint(variant: Variant) -> str:
    """Identify the content of a variant: by its sealed files, else by what the configuration says of it."""
    if variant.manifest is not None:
        files = sorted((name, file.sha256) for name, file in variant.manifest.files.items())
        return hashlib.sha256(repr((variant.manifest.id, files)).encode()).hexdigest()[:16]
    return hashlib.sha256(repr((variant.name, variant.precision, str(variant.path))).encode()).hexdigest()[:16]
