"""What a client that is refused is told of when to come back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.routing.service_rate import ServiceRate, finished, resumed, retry_after_seconds


def steady(per_second: float, seconds: float, pace: ServiceRate | None = None, start: float = 0) -> ServiceRate:
    """Answers that end one after the other."""
    for number in range(int(per_second * seconds) + 1):
        pace = finished(pace, start + number / per_second)
    assert pace is not None
    return pace


@pytest.mark.parametrize("per_second, seconds", [(1, 20), (5, 3), (5, 60), (100, 5), (0.5, 60)])
def test_a_steady_pace_is_found(per_second: float, seconds: float) -> None:
    """After a short while as after a long one."""
    pace = steady(per_second, seconds)
    assert pace.per_second(seconds) == pytest.approx(per_second, rel=0.1)
    assert retry_after_seconds(int(50 * per_second) - 1, pace, seconds) == pytest.approx(50, rel=0.1)


def test_a_new_pace_is_followed() -> None:
    """Two half-lives after a change, three quarters of it are known."""
    pace = steady(2, 20, steady(10, 100), start=100)
    assert pace.per_second(120) == pytest.approx(4, rel=0.1)


def test_nothing_known_is_five_seconds() -> None:
    """Before the first answer has ended, and when only one has."""
    assert retry_after_seconds(1000, None, 0) == 5
    assert retry_after_seconds(0, finished(None, 0), 100) == 5
    assert retry_after_seconds(0, resumed(None, 0), 100) == 5


def test_silence_lets_the_pace_fall_and_idleness_does_not() -> None:
    """Replicas that hang are worth a longer delay; an hour without requests says nothing about them."""
    pace = steady(10, 60)
    assert retry_after_seconds(19, pace, 60) == pytest.approx(2, rel=0.1)
    assert retry_after_seconds(19, pace, 80) == pytest.approx(8, rel=0.1)
    assert retry_after_seconds(19, pace, 1e6) == 120
    assert retry_after_seconds(19, resumed(pace, 3660), 3660) == pytest.approx(2, rel=0.1)


def test_a_burst_is_no_pace() -> None:
    """Answers that end in one moment count for the seconds around it."""
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
def test_more_ahead_is_no_sooner_and_all_is_within_bounds(
    story: list[tuple[bool, float]], silence: float, some: int, others: int
) -> None:
    """Whatever the pace, a client is told between one second and two minutes, and more the more wait ahead of it."""
    pace, now = None, 0.0
    for ended, pause in story:
        now += pause
        pace = finished(pace, now) if ended else resumed(pace, now)
    now += silence
    told = [retry_after_seconds(ahead, pace, now) for ahead in sorted((some, others))]
    assert 1 <= told[0] <= told[1] <= 120
