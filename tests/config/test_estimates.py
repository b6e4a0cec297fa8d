"""Intervals clustered by chat: their coverage on synthetic populations, and what they do at the edges."""

import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.estimates import (
    Estimate,
    median,
    more_units,
    percentile,
    sign_flip_p,
    student_quantile,
    token_mean,
    token_share,
)

RESAMPLES = 200
Chat = list[float]


def divergences(draw: random.Random, kl: float, spread: float) -> Chat:
    """The divergences of a chat's tokens: heavy tails, and a mean that is the chat's own."""
    mean = kl * draw.lognormvariate(-(spread**2) / 2, spread)
    return [mean * draw.lognormvariate(-0.98, 1.4) for _ in range(draw.randint(10, 60))]


def coverage(truth: float, estimate: Callable[[random.Random], Estimate]) -> float:
    """How many of 200 intervals cover the truth."""
    draws = [random.Random(seed) for seed in range(RESAMPLES)]
    return sum(found.low <= truth <= found.high for found in map(estimate, draws)) / RESAMPLES


@pytest.mark.parametrize("chats,spread", [(64, 0.3), (64, 0.8), (128, 0.8)])
@pytest.mark.parametrize("kl", [0.0005, 0.05, 0.5])
def test_intervals_of_a_mean_cover_it(kl: float, chats: int, spread: float) -> None:
    """95 % intervals of 64 and 128 chats cover the mean divergence in 90 to 98 % of 200 draws."""

    def estimate(draw: random.Random) -> Estimate:
        values = [divergences(draw, kl, spread) for _ in range(chats)]
        return token_mean([sum(chat) for chat in values], [len(chat) for chat in values])

    assert 0.90 <= coverage(kl, estimate) <= 0.98


def test_counting_tokens_would_not_cover() -> None:
    """The same intervals with each token as a unit are much too narrow: chats differ."""

    def estimate(draw: random.Random) -> Estimate:
        values = [value for _ in range(64) for value in divergences(draw, 0.05, 0.8)]
        return token_mean(values, [1] * len(values))

    assert coverage(0.05, estimate) < 0.7


@pytest.mark.parametrize("share", [0.0005, 0.02, 0.2])
def test_intervals_of_a_share_cover_it(share: float) -> None:
    """Disagreeing tokens, rare or not, with chats that differ."""

    def estimate(draw: random.Random) -> Estimate:
        counts = [draw.randint(30, 200) for _ in range(64)]
        rates = [min(share * draw.lognormvariate(-0.125, 0.5), 1.0) for _ in counts]
        hits = [sum(draw.random() < rate for _ in range(count)) for rate, count in zip(rates, counts, strict=True)]
        return token_share(hits, counts)

    assert 0.90 <= coverage(share, estimate) <= 0.99


def test_intervals_of_a_percentile_cover_it() -> None:
    """The 99th percentile of the divergences of chats that differ."""
    pool = sorted(value for seed in range(2500) for value in divergences(random.Random(f"pool {seed}"), 0.05, 0.5))
    truth = pool[int(0.99 * len(pool))]

    def estimate(draw: random.Random) -> Estimate:
        return percentile([divergences(draw, 0.05, 0.5) for _ in range(64)], 0.99)

    assert 0.90 <= coverage(truth, estimate) <= 0.99


def test_intervals_of_a_median_cover_it() -> None:
    """The median ratio of lengths; a sixth of the pairs is cut on one side or on both."""

    def estimate(draw: random.Random) -> Estimate:
        ratios = [draw.lognormvariate(math.log(1.1), 0.5) for _ in range(64)]
        cuts = [draw.randrange(18) for _ in ratios]
        return median(
            [
                (0.0 if cut in (0, 2) else r, r, math.inf if cut in (1, 2) else r)
                for r, cut in zip(ratios, cuts, strict=True)
            ]
        )

    assert 0.93 <= coverage(1.1, estimate) <= 1.0


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(1, 500)), min_size=2, max_size=40))
def test_an_interval_contains_its_value(chats: list[tuple[float, int]]) -> None:
    """Whatever the chats, the estimate lies inside its interval."""
    sums, counts = [total for total, _ in chats], [count for _, count in chats]
    found = token_mean(sums, counts)
    assert found.value == pytest.approx(sum(sums) / sum(counts))
    assert found.low - 1e-9 <= found.value <= found.high + 1e-9


def test_edges() -> None:
    """A single chat tells no interval; no hit in many tokens is a bound, not a certainty."""
    assert token_mean([3.0], [10]) == Estimate(0.3, -math.inf, math.inf, 1)
    assert token_mean([1.0, 1.0], [10, 10]) == Estimate(0.1, 0.1, 0.1, 2)
    none = token_share([0] * 64, [100] * 64)
    assert none.value == none.low == 0
    assert none.high == pytest.approx(3.84 / 6400, rel=0.01)
    unknown = median([(0.0, 1.0, math.inf)] * 40)
    assert (unknown.low, unknown.high) == (0.0, math.inf)


@pytest.mark.parametrize("degrees,expected", [(1, 12.706), (2, 4.303), (3, 3.182), (10, 2.228), (63, 1.998)])
def test_quantiles_of_student(degrees: int, expected: float) -> None:
    """Values of the tables."""
    assert student_quantile(degrees) == pytest.approx(expected, rel=0.01)


def test_more_units_shrink_an_interval_to_its_limit() -> None:
    """Half the width takes four times the chats; a value at its limit is never shown."""
    assert more_units(Estimate(0.04, 0.02, 0.06, 10), 0.05) == 30
    assert more_units(Estimate(0.05, 0.02, 0.06, 10), 0.05) is None
    assert more_units(Estimate(1.0, -math.inf, math.inf, 10), 1.2) is None


def test_sign_flips() -> None:
    """Equal differences of 20 chats don't come by chance; symmetric ones do; the same call gives the same value."""
    assert sign_flip_p([0.1] * 20) < 0.001
    assert sign_flip_p([0.1, -0.1] * 10) > 0.5
    assert sign_flip_p([0.3, 0.1, -0.2]) == sign_flip_p([0.3, 0.1, -0.2])
    draw = random.Random(1)
    small = [sign_flip_p([draw.gauss(0, 1) for _ in range(12)]) <= 0.1 for _ in range(60)]
    assert sum(small) <= 14
