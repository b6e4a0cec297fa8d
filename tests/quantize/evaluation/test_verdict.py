"""Limits and verdicts."""

import math
import random
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.measurements import (
    ChatMetrics,
    CompletionMetrics,
    Measurements,
    PairMetrics,
    PercentileMetrics,
    TaskMetrics,
    TokenSums,
)
from config.quality import Quality
from config.schema import Floor
from config.variant import measured_quality
from quantize.backends.gptqmodel import settings
from quantize.calibration.samples import within
from quantize.errors import RecipeError
from quantize.evaluation.module_checks import loss_outliers, module_figures
from quantize.evaluation.verdict import LIMITS_BY_BITS, judge, limits_for
from quantize.modules import ModuleTree
from quantize.report.text_report import quality_line
from quantize.schemes.scheme import PRESETS
from quantize.schemes.settings import SolverSettings

CHATS = 96
TOKENS = 200


def sums(kl: float = 0.0, agreement: float = 1.0, perplexity: float = 1.0, tokens: int = TOKENS) -> TokenSums:
    """Sums of a chat with these means."""
    return TokenSums(
        tokens=tokens,
        divergence=kl * tokens,
        excess_nll=math.log(perplexity) * tokens,
        agreed=round(agreement * tokens),
    )


def measured(chats: Sequence[TokenSums] = (sums(),) * CHATS, **parts: Any) -> Measurements:
    """Measurements of chats; by default of a variant that equals its parent."""
    metrics = tuple(
        ChatMetrics(chat=str(number), positions=part.tokens, generated=part) for number, part in enumerate(chats)
    )
    percentile = PercentileMetrics(value=0.0, low=0.0, high=0.0)
    return Measurements(method="test", chats=metrics, kl_p99=percentile, **parts)


def pairs(count: int, parent: CompletionMetrics, variant: CompletionMetrics, seeds: int = 1) -> list[PairMetrics]:
    """Paired completions of so many prompts, all alike."""
    return [
        PairMetrics(prompt=prompt, seed=seed, parent=parent, variant=variant)
        for prompt in range(count)
        for seed in range(seeds)
    ]


WHOLE = CompletionMetrics(tokens=100)
CUT = CompletionMetrics(tokens=128, unfinished=True)


@pytest.mark.parametrize(
    "bits,part,verdict",
    [
        (8, sums(kl=0.005), "pass"),
        (8, sums(kl=0.0051), "fail"),
        (8, sums(agreement=0.985), "pass"),
        (8, sums(agreement=0.97), "fail"),
        (8, sums(perplexity=1.006), "fail"),
        (4, sums(kl=0.05), "pass"),
        (4, sums(kl=0.051), "fail"),
        (4, sums(agreement=0.94), "pass"),
        (4, sums(agreement=0.92), "fail"),
        (4, sums(perplexity=1.03), "pass"),
        (4, sums(perplexity=1.04), "fail"),
        (4, sums(perplexity=0.9), "pass"),
    ],
)
def test_one_missed_limit_fails_a_variant(bits: int, part: TokenSums, verdict: str) -> None:
    """Limits belong to a precision, are inclusive, and each alone decides; equal chats leave no doubt."""
    quality = judge(measured([part] * CHATS), bits, "0")
    assert quality.verdict == verdict
    assert len([check for check in quality.checks if not check.passed]) == (verdict != "pass")


@pytest.mark.parametrize(
    "spread,verdict", [(0.001, "pass"), (0.04, "not shown"), (0.1, "not shown")], ids=["narrow", "wide", "wider"]
)
def test_the_end_of_the_interval_decides(spread: float, verdict: str) -> None:
    """A mean below its limit passes if its interval is, too; else it needs more chats, and says how many."""
    chats = [sums(kl=0.045 + spread * (1 if number % 2 else -1) * 0.45 / 0.5) for number in range(20)]
    chats = [part.model_copy(update={"divergence": max(part.divergence, 0.0)}) for part in chats]
    (check,) = (one for one in judge(measured(chats), 4, "0").checks if one.name == "kl_mean")
    assert check.verdict == verdict
    assert check.passed == (verdict == "pass")
    assert (check.more_chats is not None) == (verdict == "not shown")


def test_more_chats_decide_what_few_could_not() -> None:
    """With as many more chats of the same kind as was asked for, the check passes."""
    chats = [sums(kl=value) for value in (0.0, 0.02, 0.05, 0.09)] * 3
    before = next(one for one in judge(measured(chats), 4, "0").checks if one.name == "kl_mean")
    assert before.verdict == "not shown"
    assert before.more_chats is not None
    times = math.ceil((len(chats) + before.more_chats) / 4) + 1
    after = judge(measured([sums(kl=value) for value in (0.0, 0.02, 0.05, 0.09)] * times), 4, "0")
    assert next(one for one in after.checks if one.name == "kl_mean").verdict == "pass"


@pytest.mark.parametrize(
    "variant,check,verdict",
    [
        (WHOLE, "length_ratio", "pass"),
        (CompletionMetrics(tokens=140), "length_ratio", "fail"),
        (CompletionMetrics(tokens=100, repeating=True), "repeating_increase", "fail"),
        (CompletionMetrics(tokens=100, unclosed=True), "unclosed_increase", "fail"),
        (CUT, "unfinished_increase", "fail"),
    ],
)
def test_completions_are_gated(variant: CompletionMetrics, check: str, verdict: str) -> None:
    """Each figure of paired completions has its check, and a collapse fails it."""
    quality = judge(measured(completions=tuple(pairs(CHATS, WHOLE, variant)), new_tokens=128), 4, "0")
    found = {one.name: one.verdict for one in quality.checks}
    assert len(found) == 7
    assert found[check] == verdict
    assert quality.verdict == verdict


def test_completions_that_were_all_cut_show_nothing() -> None:
    """Nobody finished, so nobody knows how long the answers are: that is no pass."""
    quality = judge(measured(completions=tuple(pairs(CHATS, CUT, CUT)), new_tokens=128), 4, "0")
    found = {one.name: one.verdict for one in quality.checks}
    assert (found["length_ratio"], found["unfinished_increase"]) == ("not shown", "not shown")
    assert (found["repeating_increase"], found["unclosed_increase"]) == ("pass", "pass")
    assert quality.verdict == "not shown"
    assert quality.bound("length_ratio", upper=True) == math.inf
    assert "raise --eval-new-tokens" in quality_line(quality)


@pytest.mark.parametrize("prompts,seeds,verdict", [(8, 3, "not shown"), (32, 3, "not shown"), (96, 1, "pass")])
def test_seeds_are_no_prompts(prompts: int, seeds: int, verdict: str) -> None:
    """Few prompts don't show that a rate stays, though nothing happened; more seeds of the same don't help."""
    one_cut = [
        PairMetrics(prompt=prompts, seed=0, parent=CUT, variant=WHOLE),
        PairMetrics(prompt=prompts + 1, seed=0, parent=WHOLE, variant=CUT),
    ]
    completions = (*pairs(prompts, WHOLE, WHOLE, seeds), *one_cut)
    quality = judge(measured(completions=completions, new_tokens=128), 4, "0")
    assert next(one for one in quality.checks if one.name == "unfinished_increase").verdict == verdict


@pytest.mark.parametrize(
    "parent,variant,verdict",
    [
        ([True] * 300, [True] * 300, "pass"),
        ([True] * 300, [True] * 200 + [False] * 100, "fail"),
        ([True] * 9, [True] * 9, "not shown"),
        ([False] * 300, [False] * 300, "not shown"),
    ],
    ids=["equal", "worse", "few", "none right"],
)
def test_answers_are_gated(parent: list[bool], variant: list[bool], verdict: str) -> None:
    """Recovery and flips are held against their limits; without right answers nothing can be recovered."""
    tasks = TaskMetrics(dataset_sha256="0", parent=tuple(parent), variant=tuple(variant))
    quality = judge(measured(tasks=tasks), 4, "0")
    assert next(one for one in quality.checks if one.name == "recovery").verdict == verdict
    assert quality.tasks is not None
    assert quality.tasks.items == len(parent)


def test_rates_of_both_errors_from_a_kl_of_half_a_thousandth_to_a_half() -> None:
    """A variant at half its limit passes, one at twice it fails, whatever the distance; neither is ever mistaken."""
    draw = random.Random(7)
    for limit in (0.001, 0.005, 0.05, 0.25):
        for factor, right, wrong in ((0.5, "pass", "fail"), (2.0, "fail", "pass")):
            verdicts = [kl_verdict(draw, limit * factor, limit) for _ in range(40)]
            assert wrong not in verdicts
            assert verdicts.count(right) >= 36, (limit, factor, verdicts)


@pytest.mark.parametrize("limit", [0.0005, 0.005, 0.05, 0.5])
def test_a_variant_at_its_limit_seldom_passes_and_seldom_fails(limit: float) -> None:
    """At the limit itself both verdicts are errors of an interval's end: 2.5 % each, here at most 7.5 % of 80 draws."""
    draw = random.Random(11)
    verdicts = [kl_verdict(draw, limit, limit) for _ in range(80)]
    assert verdicts.count("pass") <= 6
    assert verdicts.count("fail") <= 6


@pytest.mark.parametrize("floor", [0.0005, 0.005, 0.05, 0.5])
def test_a_floor_admits_no_variant_that_only_seems_to_meet_it(floor: float) -> None:
    """Of variants that lie 20 % beyond a floor none is admitted, of those at a half nearly all are."""
    draw = random.Random(5)
    beyond = [quality_of_draw(draw, floor * 1.2) for _ in range(40)]
    within_it = [quality_of_draw(draw, floor * 0.5) for _ in range(40)]
    admitted = [measured_quality(one).shortfall(Floor(kl_mean=floor)) is None for one in (*beyond, *within_it)]
    assert sum(admitted[:40]) <= 1
    assert sum(admitted[40:]) >= 38


def kl_verdict(draw: random.Random, kl: float, limit: float) -> str:
    """The verdict on 96 chats whose means are log-normal around `kl`, as different as those of a real variant."""
    quality = quality_of_draw(draw, kl, limit)
    return next(one for one in quality.checks if one.name == "kl_mean").verdict


def quality_of_draw(draw: random.Random, kl: float, limit: float = 1.0) -> Quality:
    """The quality that 96 chats show of a variant at a true KL."""
    chats = [sums(kl=kl * draw.lognormvariate(-0.18, 0.6), tokens=draw.randint(50, 400)) for _ in range(CHATS)]
    return judge(measured(chats), 4, "0", {"kl_mean": limit})


def test_modules_are_held_against_their_limits() -> None:
    """A module rounded to nearest fails a variant unless that many are allowed; so does too much damping."""
    modules = [row("a.0.b", 1.0), row("a.1.b", None), row("a.2.b", 1.0, damp=0.2)]
    figures = module_figures(modules)
    assert figures == {"fallback_modules": 1, "damp": 0.2}
    strict = judge(measured(), 4, "0", modules=figures)
    assert [check.name for check in strict.checks if not check.passed] == ["fallback_modules", "damp"]
    loose = judge(measured(), 4, "0", {"fallback_modules": 1, "damp": 0.5}, modules=figures)
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
    """Zero points as the scheme says, natural order, and group-aware ordering only where there are groups."""
    told = settings(PRESETS[name], SolverSettings(damp=(0.02, 0.1)), ModuleTree(()))
    assert (told["sym"], told["desc_act"], told["true_sequential"]) == (PRESETS[name].sym, False, True)
    assert told["act_group_aware"] == (PRESETS[name].group_size > 0)
    assert told["damp_percent"] == 0.02


def test_evaluation_takes_whole_samples_within_its_budget() -> None:
    """Samples are taken in order until the next would not fit; one is always taken."""
    samples = [{"ids": [0] * length} for length in (5, 4, 3)]
    assert [len(within(samples, budget)) for budget in (1, 5, 8, 9, 100)] == [1, 1, 1, 2, 3]


def row(module: str, loss: float | None, damp: float = 0.01) -> dict[str, Any]:
    """A row of quant_log.json."""
    return {"module": module, "bits": 4, "group_size": 64, "loss": loss, "damp": damp, "fallback": loss is None}
