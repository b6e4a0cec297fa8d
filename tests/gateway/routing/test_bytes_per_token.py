"""The bytes of a token, learned from the usage that engines report."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.routing.bytes_per_token import (
    HALF_LIFE_PROMPTS,
    INITIAL_RATIO,
    MAX_RATIO,
    MIN_RATIO,
    BytesPerToken,
    learned,
)

DEFAULT = BytesPerToken()


def after(*prompts: tuple[int, int | None], known: BytesPerToken = DEFAULT) -> BytesPerToken:
    """Learn from prompts, each given as bytes and tokens."""
    for prompt_bytes, prompt_tokens in prompts:
        known = learned(known, prompt_bytes, prompt_tokens)
    return known


def test_the_initial_ratio() -> None:
    """Before any usage is known, a token has four bytes."""
    assert DEFAULT.ratio == INITIAL_RATIO == 4


@pytest.mark.parametrize("usage", [(1000, None), (1000, 0), (1000, -5), (0, 100)])
def test_invalid_usage_is_ignored(usage: tuple[int, int | None]) -> None:
    """Usage that is missing or not positive changes nothing."""
    assert after(usage) == DEFAULT


@pytest.mark.parametrize("true_ratio", [0.5, 1.5, 3, 6, 16])
def test_convergence(true_ratio: float) -> None:
    """Twenty prompts of a few hundred tokens bring the ratio within a quarter, five hundred within a percent."""
    assert after(*[(int(400 * true_ratio), 400)] * 20).ratio == pytest.approx(true_ratio, rel=0.25)
    assert after(*[(int(400 * true_ratio), 400)] * 500).ratio == pytest.approx(true_ratio, rel=0.01)


def test_older_prompts_weigh_less() -> None:
    """After a half-life of prompts in another language, both languages weigh the same."""
    known = after(*[(400, 100)] * 5000)
    known = after(*[(200, 100)] * HALF_LIFE_PROMPTS, known=known)
    assert known.ratio == pytest.approx(3, rel=0.01)


def test_long_prompts_weigh_more() -> None:
    """The ratio is one of sums, not a mean of ratios."""
    assert after((40_000, 20_000), *[(60, 10)] * 10).ratio < 2.2


def test_an_image_hardly_changes_the_ratio() -> None:
    """A megabyte with a thousand tokens counts with the largest ratio that text can have."""
    known = after(*[(4000, 1000)] * 200)
    assert learned(known, 2**20, 1000).ratio < 4.2


@given(st.lists(st.tuples(st.integers(0, 10**9), st.none() | st.integers(-1, 10**400)), max_size=20))
def test_the_ratio_is_bounded(prompts: list[tuple[int, int | None]]) -> None:
    """Any reported usage leaves the ratio within its bounds."""
    assert MIN_RATIO * 0.999 <= after(*prompts).ratio <= MAX_RATIO * 1.001
