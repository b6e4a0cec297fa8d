"""Bytes per token, learned from usage."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.routing.bytes_per_token import FIRST_GUESS, HALF_LIFE_PROMPTS, LEAST, MOST, BytesPerToken, learned

UNTAUGHT = BytesPerToken()


def after(*prompts: tuple[int, int | None], known: BytesPerToken = UNTAUGHT) -> BytesPerToken:
    """What is known after prompts of so many bytes and tokens."""
    for prompt_bytes, prompt_tokens in prompts:
        known = learned(known, prompt_bytes, prompt_tokens)
    return known


def test_the_first_guess() -> None:
    """Before any answer, four bytes make a token."""
    assert UNTAUGHT.ratio == FIRST_GUESS == 4


@pytest.mark.parametrize("usage", [(1000, None), (1000, 0), (1000, -5), (0, 100)])
def test_no_usage_teaches_nothing(usage: tuple[int, int | None]) -> None:
    """What an engine doesn't tell, or can't be, changes nothing."""
    assert after(usage) == UNTAUGHT


@pytest.mark.parametrize("true_ratio", [0.5, 1.5, 3, 6, 16])
def test_it_gets_near(true_ratio: float) -> None:
    """Twenty prompts of a few hundred tokens are enough to be within a quarter."""
    assert after(*[(int(400 * true_ratio), 400)] * 20).ratio == pytest.approx(true_ratio, rel=0.25)
    assert after(*[(int(400 * true_ratio), 400)] * 500).ratio == pytest.approx(true_ratio, rel=0.01)


def test_what_is_older_weighs_less() -> None:
    """After a half-life of prompts of another language, both weigh the same."""
    known = after(*[(400, 100)] * 5000)
    known = after(*[(200, 100)] * HALF_LIFE_PROMPTS, known=known)
    assert known.ratio == pytest.approx(3, rel=0.01)


def test_long_prompts_weigh_more() -> None:
    """It is a ratio of sums, not a mean of ratios."""
    assert after((40_000, 20_000), *[(60, 10)] * 10).ratio < 2.2


def test_a_picture_does_not_spoil_it() -> None:
    """A megabyte that makes a thousand tokens counts as text at the edge of what text can be."""
    known = after(*[(4000, 1000)] * 200)
    assert learned(known, 2**20, 1000).ratio < 4.2


@given(st.lists(st.tuples(st.integers(0, 10**9), st.none() | st.integers(-1, 10**400)), max_size=20))
def test_always_in_range(prompts: list[tuple[int, int | None]]) -> None:
    """Whatever engines report."""
    assert LEAST * 0.999 <= after(*prompts).ratio <= MOST * 1.001
