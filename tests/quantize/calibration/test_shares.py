"""How many samples each calibration file gives."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantize.calibration.datasets import (
    shares,
)


@pytest.mark.parametrize(
    "wanted,available,weights,given",
    [
        (10, {"a": 20, "b": 20}, {}, {"a": 5, "b": 5}),
        (10, {"a": 20, "b": 20}, {"a": 3, "b": 1}, {"a": 8, "b": 2}),
        (11, {"a": 20, "b": 20}, {}, {"a": 6, "b": 5}),
        (10, {"a": 20, "b": 2}, {}, {"a": 8, "b": 2}),
        (10, {"a": 20, "b": 2, "c": 9}, {"a": 1, "b": 6, "c": 1}, {"a": 4, "b": 2, "c": 4}),
        (10, {"a": 20, "b": 20}, {"a": 0, "b": 1}, {"a": 0, "b": 10}),
        (10, {"a": 3, "b": 4}, {}, {"a": 3, "b": 4}),
        (10, {}, {}, {}),
    ],
)
def test_shares(wanted: int, available: dict[str, int], weights: dict[str, float], given: dict[str, int]) -> None:
    """By weight, as far as the rows go; what one file lacks the others give."""
    assert shares(wanted, available, weights) == given


@given(
    st.integers(0, 200),
    st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 60), min_size=1),
    st.dictionaries(st.sampled_from("abcdef"), st.floats(0, 100)),
)
def test_shares_add_up(wanted: int, available: dict[str, int], weights: dict[str, float]) -> None:
    """All that is wanted is given, as long as there is enough; no file gives more than it has or weighs for."""
    given = shares(wanted, available, weights)
    weighty = {name: count for name, count in available.items() if weights.get(name, 1.0) > 0}
    assert sum(given.values()) == min(wanted, sum(weighty.values()))
    assert all(0 <= given[name] <= weighty.get(name, 0) for name in available)
