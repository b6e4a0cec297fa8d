"""When a replica counts as silent, and when as hung."""

from math import inf

import pytest

from gateway.routing.silence import PollAnswers, Silence, silence


@pytest.mark.parametrize(
    "unanswered, heard_at, now, healthy, expected",
    [
        (0, -inf, 100.0, True, "responsive"),
        # One slow poll, or two, mean nothing.
        (1, -inf, 100.0, True, "responsive"),
        (2, -inf, 100.0, False, "responsive"),
        (3, -inf, 2.9, True, "responsive"),
        (3, -inf, 3.0, True, "silent"),
        (9, -inf, 9.9, True, "silent"),
        (9, -inf, 10.0, True, "hung"),
        # A health check that fails, too, leaves no doubt.
        (3, -inf, 3.0, False, "hung"),
        (3, -inf, 2.9, False, "responsive"),
        # Bytes of a response show that it lives.
        (9, 9.0, 10.0, True, "responsive"),
        (9, 9.0, 10.0, False, "responsive"),
        (9, 9.0, 12.0, True, "silent"),
        (9, 9.0, 19.0, True, "hung"),
    ],
)
def test_silence(unanswered: int, heard_at: float, now: float, healthy: bool, expected: Silence) -> None:
    """Several polls without an answer, and nothing of any response meanwhile."""
    assert silence(PollAnswers(0.0, unanswered), heard_at, now, healthy=healthy) == expected


def test_a_replica_that_never_answered_a_poll() -> None:
    """An engine without metrics is not silent, but never spoke of itself."""
    assert silence(PollAnswers(unanswered=99), -inf, 1000.0) == "responsive"
