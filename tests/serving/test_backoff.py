"""When a replica is started again."""

from hypothesis import given
from hypothesis import strategies as st

from serving.backoff import Backoff


def test_pauses_after_failed_starts_grow_to_minutes() -> None:
    """Each failed start doubles the pause, up to the longest one; there is always a next start."""
    backoff = Backoff(first_seconds=1, longest_seconds=300)
    pauses = [backoff.after_start_failure(count) for count in range(1, 12)]
    assert pauses == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]


def test_first_crash_restarts_at_once() -> None:
    """One crash costs no pause, a series of them does."""
    assert [Backoff(first_seconds=1).after_crash(count) for count in (1, 2, 3)] == [0.0, 1.0, 2.0]


@given(st.integers(1, 10**6))
def test_pauses_are_bounded(count: int) -> None:
    """No series of failures or crashes is long enough for a pause beyond the longest."""
    backoff = Backoff()
    assert backoff.after_start_failure(count) <= backoff.longest_seconds
    assert backoff.after_crash(count) <= backoff.longest_seconds
