"""The plan: estimates that are plausible where the truth is known, and the page that tells them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.manifest import Override
from quantize.calibration.datasets import CalibrationSplit
from quantize.calibration.records import Message, Record
from quantize.evaluation.evaluate import EvaluationPlan
from quantize.planning.cost_estimate import blocks_of, estimate_cost
from quantize.planning.dry_run import (
    DryRunPlan,
    applied_limits,
    as_json,
    as_text,
    dry_run_plan,
    lowest_bits,
)
from quantize.planning.recipe import Budget, Devices
from quantize.planning.request import Request
from quantize.planning.run_costs import expected_tokens, solving_engine
from quantize.running.memory import Machine
from quantize.schemes.scheme import preset
from quantize.schemes.settings import SETTINGS, SolverSettings
from tests.quantize.shapes import QWQ_32B

MACHINE = Machine(cores=8, memory_bytes=64 * 10**9, total_bytes=64 * 10**9)
MIXED = preset("w4a16-g128").model_copy(
    update={"overrides": (Override(modules="*.down_proj", bits=8), Override(modules="*.layers.0.*"))},
)
REQUEST = Request(Path("/models/QwQ-32B"), preset("w4a16-g128"), "cuda", Path("out"), max_tokens=100)
DRAWN = CalibrationSplit(tuple(Record((Message("user", "word " * 40),), f"f:{n}", str(n)) for n in range(20)), ())


def told(request: Request = REQUEST, scheme: str = "w4a16-g128") -> DryRunPlan:
    """The outline of a request for QwQ-32B."""
    return dry_run_plan(request, QWQ_32B, preset(scheme), DRAWN, MACHINE)


def test_a_32b_model_takes_about_the_published_time() -> None:
    """128 samples of some 3,000 tokens, classic settings, a GPU with 80 GB: 64 layers, about 80 s each."""
    work = estimate_cost(QWQ_32B, 128 * 3000, SETTINGS["classic"], "cuda")
    assert work.blocks == 64
    assert 55 < work.block_seconds < 110
    assert work.gpu_bytes < 80e9
    assert work.host_bytes > 60e9


@given(
    st.integers(1000, 10**6),
    st.integers(1, 64),
    st.builds(SolverSettings, scale_norm=st.sampled_from([0.0, 2.4]), gptaq=st.sampled_from([0.0, 0.25])),
)
def test_more_work_takes_longer_and_more_cores_shorter(tokens: int, cores: int, settings: SolverSettings) -> None:
    """Estimates move in the right direction."""
    work = estimate_cost(QWQ_32B, tokens, settings, "cpu", cores)
    assert estimate_cost(QWQ_32B, tokens * 2, settings, "cpu", cores).seconds > work.seconds
    assert estimate_cost(QWQ_32B, tokens * 2, settings, "cpu", cores).host_bytes > work.host_bytes
    assert estimate_cost(QWQ_32B, tokens, settings, "cpu", cores + 1).seconds < work.seconds
    assert (
        estimate_cost(QWQ_32B, tokens, replace(settings, scale_norm=0.0, gptaq=0.0), "cpu", cores).seconds
        <= work.seconds
    )
    assert work.gpu_bytes == 0


def test_blocks_are_told_apart() -> None:
    """Layers of one block are solved one after the other."""
    blocks = blocks_of(QWQ_32B.shapes)
    assert len(blocks) == 64
    assert {len(block) for block in blocks.values()} == {7}
    assert list(blocks_of({"transformer.h.3.attn.c_proj": (1, 1)})) == ["transformer.h.3."]


def test_tokens_are_guessed_from_bytes_and_cut() -> None:
    """A fourth of the bytes; text that isn't written yet may be as long as allowed."""
    assert expected_tokens(REQUEST, DRAWN) == 20 * 50
    assert expected_tokens(replace(REQUEST, max_tokens=10), DRAWN) == 200
    assert expected_tokens(replace(REQUEST, self_generate=7), DRAWN) == 700


def test_gpus_that_are_named_do_the_work() -> None:
    """A variant for CPU may be made on a GPU."""
    assert solving_engine(replace(REQUEST, engine="cpu")) == "cpu"
    assert solving_engine(replace(REQUEST, engine="cpu", devices=Devices((2, 5)))) == "cuda"


@pytest.mark.parametrize("scheme,bits", [(preset("w8a8"), 8), (MIXED, 4), (preset("w4a16-g32"), 4)])
def test_the_fewest_bits_choose_the_limits(scheme: object, bits: int) -> None:
    """A mixture is judged as what its weakest part is."""
    assert lowest_bits(scheme) == bits  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "plan,measured",
    [
        (EvaluationPlan(), {"kl_mean": True, "length_ratio": True, "flips": False}),
        (EvaluationPlan(prompts=0, tasks=Path("q.jsonl")), {"length_ratio": False, "recovery": True, "flips": True}),
    ],
)
def test_only_what_is_measured_has_a_limit(plan: EvaluationPlan, measured: dict[str, bool]) -> None:
    """Without generations there is no length to limit, without questions no recovery."""
    limits = applied_limits(4, plan)
    assert {name: name in limits for name in measured} == measured


def test_sizes_add_up() -> None:
    """Quantized and kept tensors are all there is; biases and norms are kept."""
    plan = dry_run_plan(replace(REQUEST, scheme=MIXED), QWQ_32B, MIXED, DRAWN, MACHINE)
    assert plan.bytes == sum(plan.tensor_bytes.values())
    assert plan.quantized_modules == 63 * 7 + 1  # the first pattern counts: layer 0 keeps all but its down_proj
    assert plan.kept_bytes > told().kept_bytes > 2 * 152064 * 5120 * 2
    assert told(scheme="w8a8").kept_bytes == told().kept_bytes


def test_the_page_tells_what_was_asked() -> None:
    """One line a fact, with numbers that people know."""
    page = as_text(told()).splitlines()
    assert "size         19.3 GB (30% of the base): 16.2 GB in 448 quantized modules, 3.1 GB kept" in page
    assert "cuda         loads: Machete on Hopper, else Marlin, from Turing on" in page
    assert "GPUs         can be shared by 1, 2, 4, 8 (tensor parallel)" in page
    assert any(line.startswith("gates        kl_mean 0.05, top1_agreement 0.93") for line in page)
    assert any(line.endswith("(estimate for one data-centre GPU, 100 TFLOP/s)") for line in page)


def test_the_page_tells_exceptions_and_refusals() -> None:
    """Overrides have a line each; an engine that won't load it has its reason."""
    page = as_text(dry_run_plan(replace(REQUEST, scheme=MIXED), QWQ_32B, MIXED, DRAWN, MACHINE))
    assert "*.layers.0.*  kept as the base has them" in page
    assert "*.down_proj   8 bits" in page
    assert "won't load: vLLM on CPU loads GPTQ (*.down_proj) of 4 bits, not of 8" in page


def test_many_exceptions_are_counted() -> None:
    """The page stays one page."""
    overrides = tuple(Override(modules=f"*.layers.{n}.*") for n in range(20))
    page = as_text(told(replace(REQUEST, scheme=MIXED)))
    many = as_text(replace(told(), scheme=MIXED.model_copy(update={"overrides": overrides})))
    assert "more overrides" not in page
    assert "and 12 more overrides" in many


@pytest.mark.parametrize(
    "budget,line",
    [
        (Budget(max_bytes=20 * 10**9), "auto within max_bytes 20.0 GB; what follows is the smallest, w4a16-g128"),
        (Budget(max_kl=0.05), "auto within max_kl 0.05;"),
    ],
)
def test_a_budget_is_told_as_such(budget: Budget, line: str) -> None:
    """What the search will find isn't known yet."""
    assert line in as_text(told(replace(REQUEST, scheme=budget)))


def test_scripts_get_everything() -> None:
    """The plain data has the page's figures, and can be written as JSON."""
    plain = json.loads(json.dumps(as_json(told(replace(REQUEST, scheme=Budget(max_kl=0.05))))))
    assert plain["bytes"] == told().bytes
    assert plain["effort"]["seconds"] == pytest.approx(told().cost.seconds)
    assert plain["budget"] == {"max_bytes": None, "max_kl": 0.05}
    assert plain["scheme"]["name"] == "w4a16-g128"
