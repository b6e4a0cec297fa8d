"""Limits and verdicts."""

from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantize.backends.gptqmodel import settings
from quantize.calibration.samples import within
from quantize.errors import RecipeError
from quantize.evaluation.module_checks import loss_outliers, module_figures
from quantize.evaluation.verdict import LIMITS_BY_BITS, Metric, is_conclusive, judge, limits_for
from quantize.modules import ModuleTree
from quantize.schemes.scheme import PRESETS
from quantize.schemes.settings import SolverSettings

PERFECT = {"tokens": 10, "kl_mean": 0.0, "kl_p99": 0.0, "top1_agreement": 1.0, "perplexity_ratio": 1.0}
RATES = dict.fromkeys(("unfinished", "repeating", "unclosed"), 0.0)
GENERATION = {
    "prompts": 8,
    "seeds": 3,
    "new_tokens": 128,
    "length_ratio": 1.0,
    **RATES,
    **{f"parent_{name}": 0.0 for name in RATES},
}
TASKS = {"dataset_sha256": "0", "items": 9, "parent_accuracy": 1.0, "accuracy": 1.0, "recovery": 1.0, "flips": 0.0}


@pytest.mark.parametrize(
    "bits,figure,value,passed",
    [
        (8, "kl_mean", 0.005, True),
        (8, "kl_mean", 0.0051, False),
        (8, "top1_agreement", 0.98, True),
        (8, "top1_agreement", 0.979, False),
        (8, "perplexity_ratio", 1.006, False),
        (4, "kl_mean", 0.05, True),
        (4, "kl_mean", 0.051, False),
        (4, "top1_agreement", 0.93, True),
        (4, "top1_agreement", 0.92, False),
        (4, "perplexity_ratio", 1.03, True),
        (4, "perplexity_ratio", 1.04, False),
        (4, "perplexity_ratio", 0.9, True),
    ],
)
def test_one_missed_limit_fails_a_variant(bits: int, figure: str, value: float, passed: bool) -> None:
    """Limits belong to a precision, are inclusive, and each alone decides."""
    quality = judge({**PERFECT, figure: value}, bits, "0")
    assert quality.verdict == ("pass" if passed else "fail")
    assert [check.name for check in quality.checks if not check.passed] == ([] if passed else [figure])


@pytest.mark.parametrize(
    "part,figure,value,check,error,limit",
    [
        ("generation", "length_ratio", 1.2, "length_ratio", 0.05, 1.10),
        ("generation", "unfinished", 0.03, "unfinished_increase", 0.01, 0.02),
        ("generation", "repeating", 0.03, "repeating_increase", 0.01, 0.02),
        ("generation", "unclosed", 0.03, "unclosed_increase", 0.01, 0.02),
        ("tasks", "recovery", 0.94, "recovery", 0.01, 0.95),
        ("tasks", "flips", 0.09, "flips", 0.01, 0.08),
    ],
)
def test_texts_and_answers_are_gated_where_they_were_measured(
    part: str, figure: str, value: float, check: str, error: float, limit: float
) -> None:
    """Each figure of paired generations and questions has its check, and misses it alone."""
    figures: dict[str, Any] = {"generation": dict(GENERATION), "tasks": dict(TASKS)}
    figures[part][figure] = value
    errors = dict.fromkeys(asdict(LIMITS_BY_BITS[4]), 0.0) | {check: error}
    quality = judge({**PERFECT, **figures}, 4, "0", errors=errors)
    assert len(quality.checks) == 9
    (missed,) = (one for one in quality.checks if not one.passed)
    assert (missed.name, missed.limit) == (check, limit)
    assert missed.value == pytest.approx(value)


@pytest.mark.parametrize(
    "name,value,error,limit,expected",
    [
        ("unfinished_increase", 0.00, 1 / 24, 0.02, False),  # 24 generations can't resolve two points
        ("unfinished_increase", 0.00, 1 / 50, 0.02, True),
        ("unfinished_increase", 0.04, 0.08, 0.02, False),
        ("unfinished_increase", 0.90, 0.12, 0.02, True),  # but a collapse shows in any number
        ("unfinished_increase", -0.5, 0.20, 0.02, False),
        ("length_ratio", 1.20, 0.15, 1.10, False),
        ("length_ratio", 1.05, 0.10, 1.10, True),
        ("length_ratio", 3.00, 0.40, 1.10, True),
        ("length_ratio", 1.20, 0.15, 1.50, True),
        ("recovery", 0.90, 0.20, 0.95, False),
        ("recovery", 0.40, 0.20, 0.95, True),
        ("recovery", 1.00, float("inf"), 0.95, False),
        ("kl_mean", 0.01, 0.0, 0.05, True),
    ],
)
def test_what_chance_decides_is_no_check(name: str, value: float, error: float, limit: float, expected: bool) -> None:
    """A figure counts if it resolves its limit, or misses it by more than its error."""
    assert is_conclusive(Metric(name, value, error), limit) is expected


def test_modules_are_held_against_their_limits() -> None:
    """A module rounded to nearest fails a variant unless that many are allowed; so does too much damping."""
    modules = [row("a.0.b", 1.0), row("a.1.b", None), row("a.2.b", 1.0, damp=0.2)]
    figures = module_figures(modules)
    assert figures == {"fallback_modules": 1, "damp": 0.2}
    strict = judge(PERFECT, 4, "0", modules=figures)
    assert [check.name for check in strict.checks if not check.passed] == ["fallback_modules", "damp"]
    loose = judge(PERFECT, 4, "0", {"fallback_modules": 1, "damp": 0.5}, modules=figures)
    assert loose.verdict == "pass"
    assert module_figures([]) == {}


def test_losses_stand_out_beside_their_neighbours() -> None:
    """Loss grows with depth by nature; one of its kind far above those around it is named."""
    growing = [row(f"model.layers.{layer}.mlp.down_proj", 2.0**layer) for layer in range(20)]
    others = [row(f"model.layers.{layer}.mlp.up_proj", 1e6) for layer in range(20)]
    assert loss_outliers(growing + others) == []
    growing[10]["loss"] *= 100
    (found,) = loss_outliers(growing + others)
    assert found["module"] == "model.layers.10.mlp.down_proj"


@pytest.mark.parametrize(
    "limits,problem",
    [
        ({"kl_men": 0.1}, "limit kl_men: there is no such limit; did you mean 'kl_mean'"),
        ({"kl_mean": float("nan")}, "limit kl_mean: nan is no limit"),
    ],
)
def test_a_limit_that_cant_be_is_refused(limits: dict[str, float], problem: str) -> None:
    """A misspelt name never passes for a limit that was changed."""
    with pytest.raises(RecipeError, match=problem):
        limits_for(4, limits)


@given(bits=st.sampled_from([2, 3, 4, 8]), value=st.floats(0, 1))
def test_limits_can_be_changed_one_by_one(bits: int, value: float) -> None:
    """A changed limit leaves the others as they are for the precision; below 4 bits those for 4 hold."""
    told = limits_for(bits, {"kl_mean": value})
    assert told == asdict(LIMITS_BY_BITS[max(bits, 4)]) | {"kl_mean": value}


@pytest.mark.parametrize("name", PRESETS)
def test_settings_are_loadable_ones(name: str) -> None:
    """Symmetric, in natural order, and group-aware ordering only where there are groups."""
    told = settings(PRESETS[name], SolverSettings(damp=(0.02, 0.1)), ModuleTree(()))
    assert (told["sym"], told["desc_act"], told["true_sequential"]) == (True, False, True)
    assert told["act_group_aware"] == (PRESETS[name].group_size > 0)
    assert told["damp_percent"] == 0.02


def test_evaluation_takes_whole_samples_within_its_budget() -> None:
    """Samples are taken in order until the next would not fit; one is always taken."""
    samples = [{"ids": [0] * length} for length in (5, 4, 3)]
    assert [len(within(samples, budget)) for budget in (1, 5, 8, 9, 100)] == [1, 1, 1, 2, 3]


def row(module: str, loss: float | None, damp: float = 0.01) -> dict[str, Any]:
    """A row of quant_log.json."""
    return {"module": module, "bits": 4, "group_size": 64, "loss": loss, "damp": damp, "fallback": loss is None}
