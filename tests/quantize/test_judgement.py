"""Limits and verdicts."""

import pytest

from quantize.backends.gptqmodel import judge as judge_log
from quantize.backends.gptqmodel import settings
from quantize.errors import SolveError
from quantize.judgement import judge
from quantize.samples import within
from quantize.scheme import PRESETS
from quantize.settings import SolverSettings

PERFECT = {"tokens": 10, "kl_mean": 0.0, "kl_p99": 0.0, "top1_agreement": 1.0, "perplexity_ratio": 1.0}


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


def row(loss: object, damp: str = "0.01000") -> dict[str, object]:
    """A row of GPTQModel's log."""
    return {"layer": 3, "module": "mlp.down_proj", "loss": loss, "damp": damp}


def test_modules_are_counted_by_their_damping() -> None:
    """Modules that needed more damping than asked for are visible."""
    assert judge_log([row("0.001"), row("0.2"), row("1e-9", "0.05000")]) == {"0.01": 2, "0.05": 1}


@pytest.mark.parametrize("loss", ["rtn fallback", "fallback(rtn): 0.0123", "nan", "inf", 999999999, "999999999.0"])
def test_a_module_that_fell_back_is_an_error_by_name(loss: object) -> None:
    """Every shape in which GPTQModel reports a module it didn't solve is an error that names the module."""
    with pytest.raises(SolveError, match=r"1 of 2 modules .* layer 3 mlp\.down_proj"):
        judge_log([row("0.001"), row(loss)])


def test_many_fallbacks_are_told_in_one_line() -> None:
    """The message names five modules and counts the rest."""
    with pytest.raises(SolveError, match="and 3 more") as caught:
        judge_log([row("nan")] * 8)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", PRESETS)
def test_settings_are_loadable_ones(name: str) -> None:
    """Symmetric, in natural order, and group-aware ordering only where there are groups."""
    told = settings(PRESETS[name], SolverSettings(damp=(0.02, 0.1)))
    assert (told["sym"], told["desc_act"], told["true_sequential"]) == (True, False, True)
    assert told["act_group_aware"] == (PRESETS[name].group_size > 0)
    assert told["damp_percent"] == 0.02


def test_evaluation_takes_whole_samples_within_its_budget() -> None:
    """Samples are taken in order until the next would not fit; one is always taken."""
    samples = [{"ids": [0] * length} for length in (5, 4, 3)]
    assert [len(within(samples, budget)) for budget in (1, 5, 8, 9, 100)] == [1, 1, 1, 2, 3]
