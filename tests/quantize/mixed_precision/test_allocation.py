"""Allocation under a budget: never over it, as good as trying everything, and no worse with more to spend."""

from collections.abc import Sequence
from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantize.errors import RecipeError
from quantize.mixed_precision.allocation import Allocation, Option, allocate, trade_offs
from quantize.planning.recipe import Budget
from quantize.schemes.module_config import WeightArgs

SMALL, MIDDLE, LARGE = WeightArgs(4, 128), WeightArgs(4, 32), WeightArgs(8, 128)


def option(size: int, kl: float, weight_args: WeightArgs = SMALL) -> Option:
    """An option; most tests care for its size and its KL alone."""
    return Option(weight_args, size, kl)


# Whole numbers as KL keep sums exact, so that ties are ties. What is gained is below zero.
unit_options = st.lists(st.builds(option, st.integers(1, 40), st.integers(-20, 40)), min_size=1, max_size=4)
models = st.lists(unit_options, min_size=1, max_size=5)


def as_options(model: Sequence[Sequence[Option]]) -> dict[str, Sequence[Option]]:
    """Give units names."""
    return {f"unit {number}": module_group for number, module_group in enumerate(model)}


def every_choice(model: Sequence[Sequence[Option]]) -> list[tuple[int, float]]:
    """Bytes and KL of every choice there is."""
    return [(sum(one.bytes for one in chosen), sum(one.kl for one in chosen)) for chosen in product(*model)]


@given(model=models, max_bytes=st.integers(0, 250))
def test_within_bytes_nothing_is_better(model: list[list[Option]], max_bytes: int) -> None:
    """The least KL that fits, in the fewest bytes that have it; an error only if nothing fits."""
    fitting = [(kl, size) for size, kl in every_choice(model) if size + 7 <= max_bytes]
    if not fitting:
        with pytest.raises(RecipeError, match="raise the budget"):
            allocate(as_options(model), Budget(max_bytes=max_bytes), kept_bytes=7)
        return
    found = allocate(as_options(model), Budget(max_bytes=max_bytes), kept_bytes=7)
    assert found.bytes <= max_bytes
    assert (found.kl, found.bytes - 7) == min(fitting)


@given(model=models, max_kl=st.integers(0, 250))
def test_within_a_divergence_nothing_is_smaller(model: list[list[Option]], max_kl: int) -> None:
    """The fewest bytes that are good enough, as good as these can be; if nothing is, the best there is."""
    good = [(size, kl) for size, kl in every_choice(model) if kl <= max_kl]
    found = allocate(as_options(model), Budget(max_kl=max_kl))
    if good:
        assert (found.bytes, found.kl) == min(good)
    else:
        assert (found.kl, found.bytes) == min((kl, size) for size, kl in every_choice(model))


@given(model=models, most=st.integers(1, 6))
def test_a_thinned_front_keeps_what_the_bound_rests_on(model: list[list[Option]], most: int) -> None:
    """Its points are reachable, none beats another, and all corners of the true front's lower hull are there."""
    thinned = [(point.bytes, point.kl) for point in trade_offs(model, most)]
    exact = [(point.bytes, point.kl) for point in trade_offs(model)]
    assert set(thinned) <= set(every_choice(model))
    assert all(one[0] < other[0] and one[1] > other[1] for one, other in pairwise(thinned))
    assert set(corners(exact)) <= set(thinned)


def corners(front: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Points that no line between two others passes below or touches."""
    return [
        (x, y)
        for x, y in front
        if not any(a < x < c and (b * (c - x) + d * (x - a)) <= y * (c - a) for a, b in front for c, d in front)
    ]


@given(model=models, budgets=st.tuples(st.integers(0, 250), st.integers(0, 250)), most=st.integers(1, 6))
def test_more_to_spend_is_never_worse(model: list[list[Option]], budgets: tuple[int, int], most: int) -> None:
    """Even a thinned front gives a larger budget at least as good a choice."""
    front = trade_offs(model, most)
    least, more = ([point.kl for point in front if point.bytes <= budget][-1:] for budget in sorted(budgets))
    assert not least or more[0] <= least[0]


def test_every_unit_gets_the_numbers_that_were_counted() -> None:
    """Bytes and KL are those of the numbers that come back."""
    options = {
        "a": [option(10, 1.0, SMALL), option(12, 0.5, MIDDLE), option(20, 0.01, LARGE)],
        "b": [option(10, 9.0, SMALL), option(12, 4.5, MIDDLE), option(20, 0.1, LARGE)],
        "c": [option(5, 0.1, MIDDLE)],
    }
    found = allocate(options, Budget(max_bytes=137), kept_bytes=100)
    assert found == Allocation({"a": MIDDLE, "b": LARGE, "c": MIDDLE}, 137, found.kl)
    assert found.kl == pytest.approx(0.7)


def test_equal_choices_are_told_apart_the_same_way_every_time() -> None:
    """Of two that are equally good, units that come first get less."""
    options = {name: [option(1, 1.0, SMALL), option(2, 0.0, LARGE)] for name in "abc"}
    assert allocate(options, Budget(max_bytes=4)).weight_args == {"a": SMALL, "b": SMALL, "c": LARGE}


def test_an_option_that_is_larger_and_worse_is_never_taken() -> None:
    """Measurements have noise: a finer group may look worse."""
    options = {"a": [option(1, 1.0, SMALL), option(2, 1.1, MIDDLE)]}
    assert allocate(options, Budget(max_bytes=100)).weight_args == {"a": SMALL}


def test_a_size_that_nothing_meets_is_answered_with_one_that_is() -> None:
    """The error tells the nearest number."""
    options = {"a": [option(6_000_000, 0.5), option(11_000_001, 0.003)]}
    problem = "max_bytes 5.0 MB: the smallest variant that loads has 9.0 MB; raise the budget"
    with pytest.raises(RecipeError, match=problem):
        allocate(options, Budget(max_bytes=5_000_000), kept_bytes=3_000_000)


@given(size=st.integers(1, 10**12))
def test_the_budget_that_an_error_names_is_met(size: int) -> None:
    """It is rounded to the side on which it can be met."""
    options = {"a": [option(size, 1.0)]}
    with pytest.raises(RecipeError) as too_small:
        allocate(options, Budget(max_bytes=0))
    megabytes = too_small.value.args[0].split("has ")[1].split(" MB")[0]
    assert allocate(options, Budget(max_bytes=round(float(megabytes) * 10) * 100_000)).bytes == size
