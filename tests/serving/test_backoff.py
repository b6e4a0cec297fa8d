"""When a replica is started again."""

from hypothesis import given
from hypothesis import strategies as st

from serving.backoff import Backoff


def test_start_failures_end() -> None:
    """A replica that never gets ready is given up after the configured number of tries."""
    backoff = Backoff(first_seconds=1, start_failures=3)
    assert [backoff.after_start_failure(count) for count in (1, 2, 3)] == [1.0, 2.0, None]


def test_first_crash_restarts_at_once() -> None:
    """One crash costs no pause, a series of them does."""
    assert [Backoff(first_seconds=1).after_crash(count) for count in (1, 2, 3)] == [0.0, 1.0, 2.0]


@given(st.integers(1, 10**6))
def test_pauses_are_bounded(crashes: int) -> None:
    """No series is long enough for a pause beyond the longest."""
    assert Backoff().after_crash(crashes) <= Backoff().longest_seconds
