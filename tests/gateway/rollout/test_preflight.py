"""Preflight: a new variant may be worse than the old one by no more than the budget, shown chat by chat."""

import json
import random
from pathlib import Path

import pytest

from config.measurements import EVALUATION_FILE, ChatMetrics, Measurements, PercentileMetrics, TokenSums
from config.schema import VariantSettings
from config.variant import Variant, read_variants
from gateway.rollout.plan import QualityBudget
from gateway.rollout.preflight import compare_quality
from tests.config.sealed import seal

TOKENS = 200
HARD = [0.05 * random.Random(seed).lognormvariate(0, 0.8) for seed in range(64)]
BUDGET = QualityBudget(kl_mean=0.004, top1_agreement=0.01, perplexity_ratio=0.01)


def variant(folder: Path, name: str, divergences: list[float] | None) -> Variant:
    """A sealed variant, with the measurements of its chats if there are any."""
    path = folder / name
    path.mkdir()
    seal(path, bits=4)
    if divergences is not None:
        chats = tuple(
            ChatMetrics(
                chat=str(number),
                positions=TOKENS,
                generated=TokenSums(tokens=TOKENS, divergence=kl * TOKENS, agreed=round(TOKENS * (1 - kl))),
            )
            for number, kl in enumerate(divergences)
        )
        measured = Measurements(method="test", chats=chats, kl_p99=PercentileMetrics(value=0, low=0, high=0))
        (path / EVALUATION_FILE).write_text(json.dumps({"measurements": measured.model_dump(mode="json")}))
    return read_variants({name: VariantSettings(path=str(path))}, folder)[name]


@pytest.mark.parametrize(
    "factor,figures",
    [(1.0, []), (1.03, []), (1.3, ["kl_mean", "top1_agreement"]), (0.5, [])],
    ids=["equal", "within the budget", "worse", "better"],
)
def test_a_worse_variant_is_found_through_chats_that_differ_more(
    tmp_path: Path, factor: float, figures: list[str]
) -> None:
    """The means of both have intervals wider than the budget; the differences of the same chats have not."""
    old, new = variant(tmp_path, "old", HARD), variant(tmp_path, "new", [kl * factor for kl in HARD])
    found = compare_quality(old, new, BUDGET)
    assert [line.split(": ")[1].split(" is ")[0] for line in found] == figures
    assert all("with 95 % confidence on 64 chats; the budget is" in line for line in found)


def test_few_chats_do_not_show_that_a_variant_is_as_good(tmp_path: Path) -> None:
    """Noise that the budget does not cover is a problem, not a pass."""
    noisy = [kl + step for kl, step in zip(HARD[:6], (0.03, -0.03) * 3, strict=True)]
    found = compare_quality(variant(tmp_path, "old", HARD[:6]), variant(tmp_path, "new", noisy), BUDGET)
    assert any("kl_mean is worse" in line for line in found)


def test_variants_without_chats_are_compared_by_their_figures(tmp_path: Path) -> None:
    """Manifests of older versions have figures of the same text."""
    old, new = variant(tmp_path, "old", None), variant(tmp_path, "new", HARD)
    assert compare_quality(old, new, BUDGET) == ()


def test_broken_measurements_are_a_problem(tmp_path: Path) -> None:
    """An unreadable file stops a rollout with its path."""
    old, new = variant(tmp_path, "old", HARD), variant(tmp_path, "new", HARD)
    assert new.path is not None
    (new.path / EVALUATION_FILE).write_text('{"measurements": {}}')
    (problem,) = compare_quality(old, new, BUDGET)
    assert "measurements.method: Field required; evaluate the variant again" in problem
