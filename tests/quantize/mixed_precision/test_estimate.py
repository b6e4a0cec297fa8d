"""Estimates: what was measured is predicted afterwards, and noise gains nothing."""

from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantize.mixed_precision.allocation import Option, allocate
from quantize.mixed_precision.estimate import (
    Estimate,
    Measured,
    aimed,
    alone_of,
    best_of,
    corrected,
    first_estimate,
    parts_of,
    plausible_changes,
    restated,
)
from quantize.mixed_precision.solves import Assignment
from quantize.planning.recipe import Budget
from quantize.schemes.module_config import WeightArgs

WIDE, START, LARGE = WeightArgs(4, 128), WeightArgs(4, 64), WeightArgs(8, -1)
UNITS = "abcdef"
SIZES = {WIDE: 9, START: 10, LARGE: 20}
PRICED = {unit: [Option(numbers, size, 0.0) for numbers, size in SIZES.items()] for unit in UNITS}
ALL_START = dict.fromkeys(UNITS, START)
CHANGES = {unit: {WIDE: 0.001 * place, LARGE: -0.002 * place} for place, unit in enumerate(UNITS, 1)}

assignments = st.fixed_dictionaries({unit: st.sampled_from([WIDE, START, LARGE]) for unit in UNITS})
shares = st.floats(0.3, 3.5)


def given_numbers(**changed: WeightArgs) -> Assignment:
    """The start with some units exchanged."""
    return {**ALL_START, **changed}


def truth(assignment: Assignment, factors: Mapping[WeightArgs, float]) -> float:
    """The divergence of a model whose exchanges make these shares of their sums."""
    exchanged = {unit: one for unit, one in assignment.items() if one != START}
    return 0.1 + sum(factors[one] * CHANGES[unit][one] for unit, one in exchanged.items())


@given(chosen=assignments, wide=shares, large=shares)
def test_what_was_measured_is_predicted(chosen: Assignment, wide: float, large: float) -> None:
    """After a correction the estimate gives the start's, the parts' and the assignment's own divergence."""
    factors = {WIDE: wide, LARGE: large}
    parts = {numbers: truth(part, factors) for numbers, part in parts_of(chosen, ALL_START).items()}
    found = corrected(Estimate(ALL_START, 0.1, CHANGES), chosen, parts)
    for assignment in (ALL_START, chosen, *parts_of(chosen, ALL_START).values()):
        assert found.predicted(assignment) == pytest.approx(truth(assignment, factors))


@given(chosen=assignments)
def test_parts_add_up_to_the_assignment(chosen: Assignment) -> None:
    """Every exchange is in exactly one part, and a part has no others."""
    parts = parts_of(chosen, ALL_START)
    exchanged = [(unit, part[unit]) for part in parts.values() for unit in UNITS if part[unit] != START]
    assert sorted(exchanged, key=str) == sorted(((unit, one) for unit, one in chosen.items() if one != START), key=str)
    assert all(set(part.values()) <= {START, numbers} for numbers, part in parts.items())


def test_the_first_factors_are_those_of_whole_solutions() -> None:
    """All units exchanged change 0.042 by the sum; 0.021 were measured, so half of it counts."""
    whole = dict.fromkeys(UNITS, LARGE)
    found = first_estimate(CHANGES, [ALL_START, whole], [0.1, 0.079])
    assert found.factors == {LARGE: pytest.approx(0.5)}
    assert found.predicted(whole) == pytest.approx(0.079)
    assert found.predicted(given_numbers(f=LARGE)) == pytest.approx(0.1 - 0.006)


@pytest.mark.parametrize("kl,factor", [(0.2, 0.25), (-9.0, 4.0), (0.1, 0.25)])
def test_a_factor_stays_in_its_range(kl: float, factor: float) -> None:
    """A measurement that is worse although everything is larger is noise."""
    found = first_estimate(CHANGES, [ALL_START, dict.fromkeys(UNITS, LARGE)], [0.1, kl])
    assert found.factors == {LARGE: factor}


@pytest.mark.parametrize(
    "kls,expected",
    [
        ({WIDE: 0.11, LARGE: 0.07}, {WIDE: 0.01, LARGE: -0.03}),
        ({WIDE: 0.09, LARGE: 0.12}, {WIDE: 0.0, LARGE: 0.0}),
    ],
)
def test_noise_gains_nothing(kls: Mapping[WeightArgs, float], expected: Mapping[WeightArgs, float]) -> None:
    """Smaller numbers that look better are as good, and larger ones that look worse."""
    assert plausible_changes({"a": {START: 0.1, **kls}}, ALL_START, PRICED) == {"a": pytest.approx(expected)}


def test_a_unit_reacts_to_other_numbers_as_its_kind_does() -> None:
    """With the numbers of the start its own figure; with others that figure times its kind's ratio."""
    kind_of = {unit: "qkv" if unit in "abc" else "down" for unit in UNITS}
    solves = [ALL_START, dict.fromkeys(UNITS, LARGE), given_numbers(a=WIDE, b=WIDE, c=WIDE)]
    kinds = [{"qkv": 0.2, "down": 0.0}, {"qkv": 0.01, "down": 0.0}, {"qkv": 0.5, "down": 0.0}]
    found = alone_of({"a": 0.1, "b": 0.06, "c": 0.02, "d": 0.0, "e": 0.0, "f": 0.0}, kinds, kind_of, solves)
    assert found["a"] == {START: 0.1, LARGE: pytest.approx(0.005), WIDE: pytest.approx(0.25)}
    assert found["c"] == {START: 0.02, LARGE: pytest.approx(0.001), WIDE: pytest.approx(0.05)}
    assert found["d"] == {START: 0.0, LARGE: 0.0}


@pytest.mark.parametrize("max_kl,without_kl,whole_kl,expected", [(0.05, 0.2, 0.1, 0.1), (0.05, 0.2, 0.0, 0.05)])
def test_mixtures_have_a_limit_of_their_own(max_kl: float, without_kl: float, whole_kl: float, expected: float) -> None:
    """By the ratio of an assignment without GPTAQ and with it."""
    assert restated(Budget(max_kl=max_kl), without_kl, whole_kl).max_kl == pytest.approx(expected)
    assert restated(Budget(max_bytes=9), without_kl, whole_kl) == Budget(max_bytes=9)


def test_options_are_what_can_be_exchanged() -> None:
    """Units of the start cost nothing; numbers that no solution has are not offered."""
    found = Estimate(ALL_START, 0.1, {**CHANGES, "a": {}}, {LARGE: 0.5}).options(PRICED)
    assert [(one.weight_args, one.kl) for one in found["a"]] == [(START, 0.0)]
    assert [(one.weight_args, one.kl) for one in found["b"]] == [(WIDE, 0.002), (START, 0.0), (LARGE, -0.002)]


@pytest.mark.parametrize("bend", [0.5, 1.0, 2.0])
def test_the_loop_comes_to_a_divergence_that_the_model_has(bend: float) -> None:
    """A model whose divergence doesn't fall with the sum, but along a curve: four rounds find the fewest bytes."""
    units = [f"unit {number}" for number in range(40)]
    start, whole = dict.fromkeys(units, START), dict.fromkeys(units, LARGE)
    changes = {unit: {LARGE: -0.1 / 40 * (0.5 + place / 39)} for place, unit in enumerate(units)}
    priced = {unit: [Option(START, 10, 0.0), Option(LARGE, 20, 0.0)] for unit in units}

    def of_model(assignment: Assignment) -> float:
        left = sum(-changes[unit][LARGE] for unit in units if assignment[unit] == START)
        return float(0.1 * (left / 0.1) ** bend)

    tried = [Measured(one, size, of_model(one)) for one, size in ((start, 400), (whole, 800))]
    estimate, budget = first_estimate(changes, [start, whole], [0.1, 0.0]), Budget(max_kl=0.03)
    for _ in range(4):
        found = allocate(estimate.options(priced), aimed(estimate, tried, budget))
        tried.append(Measured(found.weight_args, found.bytes, of_model(found.weight_args)))
    best = best_of(tried, budget)
    assert best is not None
    assert 0.027 < best.kl <= 0.03


def test_a_size_is_aimed_at_as_it_is() -> None:
    """Only a divergence is restated."""
    assert aimed(Estimate(ALL_START, 0.1, CHANGES), [], Budget(max_bytes=7)) == Budget(max_bytes=7)


def test_a_start_that_is_good_enough_stays() -> None:
    """Nothing is exchanged, and nothing more is measured."""
    estimate = Estimate(ALL_START, 0.1, CHANGES)
    budget = aimed(estimate, [Measured(ALL_START, 60, 0.1)], Budget(max_kl=0.2))
    options = {
        unit: [one for one in every if one.weight_args != WIDE] for unit, every in estimate.options(PRICED).items()
    }
    assert allocate(options, budget).weight_args == ALL_START


def measured(*pairs: tuple[int, float]) -> list[Measured]:
    """Measurements of bytes and KL."""
    return [Measured({}, size, kl) for size, kl in pairs]


@pytest.mark.parametrize(
    "budget,pairs,expected",
    [
        (Budget(max_bytes=10), [(10, 0.2), (9, 0.1), (11, 0.0)], 1),
        (Budget(max_bytes=10), [(10, 0.1), (9, 0.1)], 1),
        (Budget(max_kl=0.1), [(10, 0.2), (12, 0.1), (11, 0.05)], 2),
        (Budget(max_kl=0.1), [(11, 0.09), (11, 0.05)], 1),
        (Budget(max_kl=0.1), [(10, 0.2)], None),
    ],
)
def test_the_best_of_what_was_measured(
    budget: Budget, pairs: Sequence[tuple[int, float]], expected: int | None
) -> None:
    """Within a size the least divergence, within a divergence the fewest bytes; the estimate has no say."""
    every = measured(*pairs)
    assert best_of(every, budget) == (None if expected is None else every[expected])
