"""Losses of solved modules: what counts as solved, and how one compares with its kind."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.manifest import ExpertCoverage
from quantize.backends.losses import (
    SolvedModule,
    as_loss,
    by_damping,
    expert_coverage,
    fallbacks,
    loss_ratio,
    require_solved,
)
from quantize.errors import SolveError


def solved(loss: float | None, *, layer: int = 3, leaf: str = "down_proj", damp: float = 0.01) -> SolvedModule:
    """One module of a model."""
    return SolvedModule(f"model.layers.{layer}.mlp.{leaf}", layer, 4, 64, loss, damp)


@pytest.mark.parametrize(
    "told,loss",
    [
        (0.25, 0.25),
        ("0.2500000000", 0.25),
        (28_000.0, 28_000.0),
        (float("nan"), None),
        ("inf", None),
        (999_999_999, None),
        ("rtn fallback", None),
        ("fallback(rtn): 0.0123", None),
        (None, None),
    ],
)
def test_a_loss_is_a_sane_number_or_none(told: Any, loss: float | None) -> None:
    """Words, NaN and the library's stand-in for an unknown loss all mean: rounded, not solved."""
    assert as_loss(told) == loss


def test_modules_are_counted_by_their_damping() -> None:
    """Modules that needed more damping than asked for are visible; rounded ones needed none."""
    assert by_damping([solved(1.0), solved(1.0), solved(1.0, damp=0.05), solved(None, damp=1.0)]) == {
        "0.01": 2,
        "0.05": 1,
    }


def test_rounded_modules_are_named_and_only_some_are_accepted() -> None:
    """The message names modules, says how many more there are, and how to accept them."""
    modules = [solved(None, layer=layer) for layer in range(8)] + [solved(1.0)]
    assert len(fallbacks(modules)) == 8
    require_solved(modules, allowed=8)
    with pytest.raises(SolveError, match=r"8 of 9 .*model.layers.0.mlp.down_proj.* and 3 more; .*--allow-fallback 8"):
        require_solved(modules, allowed=7)


def test_a_loss_compares_with_its_own_kind() -> None:
    """The median is of modules of the same name; another kind's losses don't count."""
    before = [solved(1.0), solved(2.0), solved(3.0), solved(100.0, leaf="q_proj")]
    assert loss_ratio([*before, solved(5.0)]) == 2.0
    assert loss_ratio([*before, solved(None)]) is None
    assert loss_ratio([]) is None
    assert loss_ratio([solved(0.0)]) is None


@given(st.lists(st.floats(0.001, 1e6), min_size=1))
def test_the_ratio_is_finite_and_positive(losses: list[float]) -> None:
    """Whatever the losses, the comparison is a number that a person can read."""
    ratio = loss_ratio([solved(loss) for loss in losses])
    assert ratio is not None
    assert math.isfinite(ratio)
    assert ratio > 0


def test_experts_are_counted_by_their_tokens() -> None:
    """One count an expert; those that too few tokens reached are named, and are no failed modules."""
    modules = [
        SolvedModule(f"m.experts.{expert}.{leaf}", 0, 4, 64, None if few else 1.0, 0.01, tokens, few)
        for expert, tokens, few in ((0, 900, False), (1, 3, True), (2, 40, False))
        for leaf in ("up_proj", "down_proj")
    ]
    coverage = expert_coverage([solved(1.0), *modules])
    assert coverage == ExpertCoverage(experts=3, fewest_tokens=3, median_tokens=40, undersampled=("m.experts.1",))
    assert fallbacks(modules) == ()
    assert expert_coverage([solved(1.0)]) is None
