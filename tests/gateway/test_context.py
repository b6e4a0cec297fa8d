"""Which replicas can take a request of some length at all."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.routing.context import ESTIMATE_OVER, fits
from serving.replica import Replica


def replica(length_tokens: int | None) -> Replica:
    """A replica with a context of this length."""
    return Replica("a-1", "a", "int8", "http://a", "m1", max_model_len_tokens=length_tokens)


@pytest.mark.parametrize(
    "length_tokens, prompt_tokens, answer_tokens, expected",
    [
        (None, 1e9, 10**9, True),
        (1000, 0, None, True),
        (1000, 999, None, True),
        (1000, 1298, None, True),
        (1000, 1300, None, False),
        (1000, 0, 1000, True),
        (1000, 0, 1001, False),
        (1000, 650, 500, True),
        (1000, 660, 500, False),
    ],
)
def test_what_fits(length_tokens: int | None, prompt_tokens: float, answer_tokens: int | None, expected: bool) -> None:
    """A replica is left out only if the prompt, as short as it may be, and the answer asked for are too much."""
    assert fits(replica(length_tokens), prompt_tokens, answer_tokens) is expected


@given(st.integers(1, 10**6), st.integers(0, 10**6), st.none() | st.integers(1, 10**6), st.floats(0.5, ESTIMATE_OVER))
def test_nothing_that_fits_is_left_out(
    length_tokens: int, prompt_tokens: int, answer_tokens: int | None, off: float
) -> None:
    """Whatever an engine would take is sent to it, unless the estimate is off by more than it may be."""
    if prompt_tokens + (answer_tokens or 1) <= length_tokens:
        estimate = prompt_tokens * off
        assert fits(replica(length_tokens), estimate, answer_tokens)
