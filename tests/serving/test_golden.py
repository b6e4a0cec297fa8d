"""What the golden prompt tells apart."""

from itertools import cycle, islice

import pytest

from config.golden import GoldenAnswer, distance
from serving.golden import mismatch

TOKENS = 128


def shifted(by: float, pattern: tuple[int, ...] = (1, -1)) -> tuple[float, ...]:
    """Log-probabilities that lie `by` nats (root mean square) from -2, in a direction of their own."""
    return tuple(-2 + by * sign for sign in islice(cycle(pattern), TOKENS - 1))


PARENT = shifted(0.0)
ROUNDED = (1, 1, -1, -1)
IDS = tuple(range(TOKENS))
WEIGHT_ONLY = GoldenAnswer(IDS, shifted(0.6), PARENT)
BASE = GoldenAnswer(IDS, PARENT)
INT8_ACTIVATIONS = GoldenAnswer(IDS, shifted(0.3), PARENT, exact=False)


@pytest.mark.parametrize(
    "golden,served,wrong",
    [
        (WEIGHT_ONLY, shifted(0.6), None),
        (WEIGHT_ONLY, shifted(0.66), None),  # another engine
        (WEIGHT_ONLY, PARENT, "0.600 nats from its record"),
        (WEIGHT_ONLY, shifted(0.3), "0.300 nats from its record"),  # another precision
        (WEIGHT_ONLY, shifted(0.6)[:-1], "inf nats"),
        (WEIGHT_ONLY, (float("nan"),) * (TOKENS - 1), "nan nats"),
        (BASE, shifted(0.066), None),
        (BASE, shifted(0.3), "0.300 nats from its record"),
        (INT8_ACTIVATIONS, shifted(0.3, ROUNDED), None),  # as far from the record as the parent is, elsewhere
        (INT8_ACTIVATIONS, shifted(0.066, ROUNDED), "0.066 nats from its parent's record"),
        (INT8_ACTIVATIONS, shifted(0.7, ROUNDED), "nats from its record, at most 0.600"),  # int4
    ],
)
def test_a_server_is_known_by_what_it_says(golden: GoldenAnswer, served: tuple[float, ...], wrong: str | None) -> None:
    """A variant passes on another engine; parent, another precision and numbers that are none don't."""
    told = mismatch(served, golden)
    assert told is None if wrong is None else wrong in (told or "")


def test_distance_is_symmetric_and_zero_for_the_same() -> None:
    """It is a distance."""
    assert distance(PARENT, PARENT) == 0
    assert distance(PARENT, shifted(0.3)) == pytest.approx(0.3) == distance(shifted(0.3), PARENT)
    assert distance((), ()) == float("inf")
