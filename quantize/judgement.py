"""Limits on a variant's distance from its parent, by precision, and the verdict."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from config.manifest import Check, Quality


@dataclass(frozen=True, slots=True)
class Limits:
    """The most divergence and perplexity, and the least agreement, that pass."""

    kl_mean: float
    top1_agreement: float
    perplexity_ratio: float


# Starting points from published recoveries and llama.cpp's KL scale; a family of models may need its own.
LIMITS_BY_BITS: Mapping[int, Limits] = MappingProxyType(
    {
        8: Limits(kl_mean=0.005, top1_agreement=0.98, perplexity_ratio=1.005),
        4: Limits(kl_mean=0.05, top1_agreement=0.93, perplexity_ratio=1.03),
    },
)


def judge(figures: Mapping[str, Any], bits: int, dataset_sha256: str) -> Quality:
    """Hold measured figures against the limits for `bits`."""
    limits = LIMITS_BY_BITS[bits]
    checks = (
        _at_most("kl_mean", figures["kl_mean"], limits.kl_mean),
        _at_least("top1_agreement", figures["top1_agreement"], limits.top1_agreement),
        _at_most("perplexity_ratio", figures["perplexity_ratio"], limits.perplexity_ratio),
    )
    verdict: Literal["pass", "fail"] = "pass" if all(check.passed for check in checks) else "fail"
    return Quality(**figures, dataset_sha256=dataset_sha256, checks=checks, verdict=verdict)


def _at_most(name: str, value: float, limit: float) -> Check:
    return Check(name=name, value=value, limit=limit, passed=value <= limit)


def _at_least(name: str, value: float, limit: float) -> Check:
    return Check(name=name, value=value, limit=limit, passed=value >= limit)
