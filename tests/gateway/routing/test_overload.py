"""How long a replica that refused for want of room is spared."""

from math import inf, nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.routing.overload import NOT_OVERLOADED, Overload, accepted, refused


def after(*refusals: tuple[float, float | None]) -> Overload:
    """Live through refusals, each at a time and with the delay that the replica asked for."""
    mark = NOT_OVERLOADED
    for now, asked_seconds in refusals:
        mark = refused(mark, now, asked_seconds)
    return mark


@pytest.mark.parametrize(
    "refusals, until",
    [
        ([(0, None)], 0.25),
        ([(0, None), (1, None)], 1.5),
        ([(0, None), (1, None), (2, None)], 3),
        ([(when, None) for when in (0, 1, 2, 4, 8, 16)], 21),
        ([(when, None) for when in range(0, 20_000, 10)], 19_995),
        # One wave.
        ([(0, None)] * 20, 0.25),
        ([(0, None), (0.2, None)], 0.45),
        # What it asks for goes, within reason.
        ([(0, 3)], 3),
        ([(0, 600)], 10),
        ([(0, inf)], 10),
        ([(0, 1e-9)], 0.25),
        ([(0, 3), (1, None)], 3),
        # Nothing to go by.
        ([(0, 0)], 0.25),
        ([(0, -5)], 0.25),
        ([(0, nan)], 0.25),
    ],
)
def test_a_refusal_holds(refusals: list[tuple[float, float | None]], until: float) -> None:
    """The replica is spared until then, and not a moment longer."""
    mark = after(*refusals)
    assert mark.until == pytest.approx(until)
    assert mark.full(mark.until - 1e-6)
    assert not mark.full(mark.until)


def test_an_answer_clears_the_mark() -> None:
    """Next time, it starts from the shortest delay."""
    assert accepted(NOT_OVERLOADED, 2) is NOT_OVERLOADED
    assert accepted(after((0, None), (1, None)), 2) is NOT_OVERLOADED


def test_how_much_it_takes_is_remembered() -> None:
    """The least that it refused with; answers let in one more each once it is quiet, and in the end it is forgotten."""
    mark = refused(refused(NOT_OVERLOADED, 0, at_once=5), 0, at_once=4)
    assert mark.most == 4
    assert accepted(mark, 0.5).most == 4
    assert not accepted(mark, 0.1).full(0.1)
    assert accepted(accepted(mark, 1), 2).most == 6
    assert accepted(mark, 61) is NOT_OVERLOADED


@given(st.lists(st.tuples(st.floats(0, 20), st.none() | st.floats()), min_size=1, max_size=50))
def test_no_replica_is_spared_for_long(story: list[tuple[float, float | None]]) -> None:
    """Whatever it asks for, and however often it refuses, ten seconds later it is asked again."""
    now, mark = 0.0, NOT_OVERLOADED
    for pause, asked_seconds in story:
        now += pause
        mark = refused(mark, now, asked_seconds)
        assert now < mark.until <= now + 10
