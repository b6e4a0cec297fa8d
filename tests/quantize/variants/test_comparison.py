"""Differences between two manifests, and which metrics are better."""

import json
from typing import Any

import pytest

from config.manifest import Base, Override, SealedFile
from quantize.schemes.scheme import preset
from quantize.variants.comparison import Difference, compare, comparison_json, comparison_text
from tests.quantize.manifests import manifest, quality


def test_equals_differ_in_nothing() -> None:
    """Each part is the same."""
    comparison = compare(manifest(), manifest())
    assert comparison.differences == ()
    assert comparison.files == ()
    assert comparison.comparable
    assert comparison_text(comparison).count("the same") == 6


@pytest.mark.parametrize(
    "left,right,line",
    [
        ({}, {"scheme": preset("w4a16-g32")}, "group_size: 64 -> 32 (-32)"),
        ({}, {"quality": quality(kl_mean=0.02)}, "kl_mean: 0.04 -> 0.02 (-0.02, better)"),
        ({}, {"quality": quality(top1_agreement=0.9)}, "top1_agreement: 0.94 -> 0.9 (-0.04, worse)"),
        ({}, {"quality": quality(verdict="fail")}, "verdict: pass -> fail"),
        ({"calibration": None}, {}, "samples: none -> 16"),
        ({}, {"base": Base(name="smol", digest="0" * 64, dtype="bf16")}, "metrics are not comparable"),
        ({}, {"quality": quality(tokens=17)}, "metrics are not comparable"),
        ({}, {"files": {"a": SealedFile(sha256="1", bytes=3)}}, "a: only right"),
        ({}, {"files": {"model.safetensors": SealedFile(sha256="1", bytes=7_000_009)}}, "7000009 bytes (+9)"),
        (
            {},
            {"files": {"model.safetensors": SealedFile(sha256="1", bytes=7_000_000)}},
            "differs, 7000000 bytes in both",
        ),
        (
            {},
            {
                "scheme": preset("w4a16-g64").model_copy(
                    update={"overrides": (Override(modules="*.down_proj", bits=8),)}
                )
            },
            "overrides.*.down_proj.bits: none -> 8",
        ),
    ],
)
def test_each_part_is_compared(left: dict[str, Any], right: dict[str, Any], line: str) -> None:
    """Values have both sides, numbers also their change."""
    assert line in comparison_text(compare(manifest(**left), manifest(**right)))


@pytest.mark.parametrize(
    "part,key,left,right,better",
    [
        ("quality", "kl_mean", 0.1, 0.2, "left"),
        ("quality", "reasoning.kl_mean", 0.2, 0.1, "right"),
        ("quality", "top1_agreement", 0.9, 0.95, "right"),
        ("quality", "tasks.recovery", 0.99, 0.95, "left"),
        ("quality", "tokens", 1, 2, None),
        ("quality", "checks.kl_mean.limit", 0.1, 0.2, None),
        ("quality", "length_ratio", None, 1.2, None),
        ("scheme", "bits", 4, 8, None),
    ],
)
def test_only_metrics_are_better_or_worse(
    part: str, key: str, left: float | None, right: float, better: str | None
) -> None:
    """Lower divergence, perplexity and length are better, higher agreement and recovery."""
    assert Difference(part, key, left, right).better == better


def test_programs_read_the_same() -> None:
    """The JSON holds every difference with its change."""
    comparison = compare(manifest(), manifest(quality=quality(kl_mean=0.02), id="other"))
    value = json.loads(comparison_json(comparison))
    assert (value["left"], value["right"], value["comparable"]) == ("smol-int4-01234567", "other", True)
    (row,) = value["differences"]
    assert row["delta"] == pytest.approx(-0.02)
    assert (row["key"], row["better"]) == ("kl_mean", "right")
    assert value["same_files"] == ["model.safetensors"]
