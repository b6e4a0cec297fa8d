"""For how long a replica that refused a request with 429 or 503 is spared."""

from math import inf, nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.routing.overload import NOT_OVERLOADED, Overload, accepted, refused


def after(*refusals: tuple[float, float | None]) -> Overload:
    """Apply refusals, each given as its time and the `Retry-After` of the replica."""
    overload = NOT_OVERLOADED
    for now, retry_after_seconds in refusals:
        overload = refused(overload, now, retry_after_seconds)
    return overload


@pytest.mark.parametrize(
    "refusals, until",
    [
        ([(0, None)], 0.25),
        ([(0, None), (1, None)], 1.5),
        ([(0, None), (1, None), (2, None)], 3),
        ([(when, None) for when in (0, 1, 2, 4, 8, 16)], 21),
        ([(when, None) for when in range(0, 20_000, 10)], 19_995),
        # Refusals of one wave do not double.
        ([(0, None)] * 20, 0.25),
        ([(0, None), (0.2, None)], 0.45),
        # The replica's Retry-After, within bounds.
        ([(0, 3)], 3),
        ([(0, 600)], 10),
        ([(0, inf)], 10),
        ([(0, 1e-9)], 0.25),
        ([(0, 3), (1, None)], 3),
        # A Retry-After that is not positive is ignored.
        ([(0, 0)], 0.25),
        ([(0, -5)], 0.25),
        ([(0, nan)], 0.25),
    ],
)
def test_backoff(refusals: list[tuple[float, float | None]], until: float) -> None:
    """The replica is spared until exactly that time."""
    overload = after(*refusals)
    assert overload.until == pytest.approx(until)
    assert overload.active(overload.until - 1e-6)
    assert not overload.active(overload.until)


def test_an_answer_ends_an_overload() -> None:
    """The next backoff starts from the shortest delay."""
    assert accepted(NOT_OVERLOADED, 2) is NOT_OVERLOADED
    assert accepted(after((0, None), (1, None)), 2) is NOT_OVERLOADED


def test_the_limit_is_remembered() -> None:
    """The limit is the least load that was refused; each answer after a quiet second raises it, a minute clears it."""
    overload = refused(refused(NOT_OVERLOADED, 0, in_flight=5), 0, in_flight=4)
    assert overload.limit == 4
    assert accepted(overload, 0.5).limit == 4
    assert not accepted(overload, 0.1).active(0.1)
    assert accepted(accepted(overload, 1), 2).limit == 6
    assert accepted(overload, 61) is NOT_OVERLOADED


@given(st.lists(st.tuples(st.floats(0, 20), st.none() | st.floats()), min_size=1, max_size=50))
def test_backoff_is_bounded(refusals: list[tuple[float, float | None]]) -> None:
    """After any Retry-After and any number of refusals, the backoff ends within ten seconds."""
    now, overload = 0.0, NOT_OVERLOADED
    for pause, retry_after_seconds in refusals:
        now += pause
        overload = refused(overload, now, retry_after_seconds)
        assert now < overload.until <= now + 10
