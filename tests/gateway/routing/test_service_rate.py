"""The rate at which answers end, and the Retry-After that follows from it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.routing.service_rate import ServiceRate, finished, resumed, retry_after_seconds


def steady(per_second: float, seconds: float, rate: ServiceRate | None = None, start: float = 0) -> ServiceRate:
    """The rate after answers that ended at regular intervals."""
    for number in range(int(per_second * seconds) + 1):
        rate = finished(rate, start + number / per_second)
    assert rate is not None
    return rate


@pytest.mark.parametrize("per_second, seconds", [(1, 20), (5, 3), (5, 60), (100, 5), (0.5, 60)])
def test_a_steady_rate(per_second: float, seconds: float) -> None:
    """A steady rate is measured within a tenth, after seconds or a minute."""
    rate = steady(per_second, seconds)
    assert rate.per_second(seconds) == pytest.approx(per_second, rel=0.1)
    assert retry_after_seconds(int(50 * per_second) - 1, rate, seconds) == pytest.approx(50, rel=0.1)


def test_a_change_of_rate() -> None:
    """Two half-lives after a change, three quarters of it are measured."""
    rate = steady(2, 20, steady(10, 100), start=100)
    assert rate.per_second(120) == pytest.approx(4, rel=0.1)


def test_an_unknown_rate() -> None:
    """Without a rate, which takes two answers, Retry-After is five seconds."""
    assert retry_after_seconds(1000, None, 0) == 5
    assert retry_after_seconds(0, finished(None, 0), 100) == 5
    assert retry_after_seconds(0, resumed(None, 0), 100) == 5


def test_silence_and_idleness() -> None:
    """Without answers the rate falls while requests wait, but not while none do."""
    rate = steady(10, 60)
    assert retry_after_seconds(19, rate, 60) == pytest.approx(2, rel=0.1)
    assert retry_after_seconds(19, rate, 80) == pytest.approx(8, rel=0.1)
    assert retry_after_seconds(19, rate, 1e6) == 120
    assert retry_after_seconds(19, resumed(rate, 3660), 3660) == pytest.approx(2, rel=0.1)


def test_a_burst() -> None:
    """Answers that end at the same moment count as a rate over at least a second."""
    start = finished(None, 0)
    burst = start
    for _ in range(50):
        burst = finished(burst, 0)
    assert burst.per_second(0) <= 55
    assert burst.per_second(10) == pytest.approx(5, rel=0.4)
    later = steady(1, 60)
    for _ in range(20):
        later = finished(later, 60)
    assert later.per_second(60) <= 1 + 20 * 0.07 + 0.1


events = st.lists(st.tuples(st.booleans(), st.floats(0, 1e5)), max_size=50)


@given(events, st.floats(0, 1e7), st.integers(0, 10**6), st.integers(0, 10**6))
def test_retry_after_is_bounded(story: list[tuple[bool, float]], silence: float, some: int, others: int) -> None:
    """At any rate Retry-After is between one second and two minutes, and does not shrink with more requests ahead."""
    rate, now = None, 0.0
    for ended, pause in story:
        now += pause
        rate = finished(rate, now) if ended else resumed(rate, now)
    now += silence
    delays = [retry_after_seconds(ahead, rate, now) for ahead in sorted((some, others))]
    assert 1 <= delays[0] <= delays[1] <= 120
