"""What a request is evidence of."""

import pytest

from gateway.rollout.arms import seconds_between_tokens


@pytest.mark.parametrize(
    "seconds, events, expected",
    [
        (0.9, 10, 0.1),
        (0.0, 0, None),
        (0.0, 1, None),
        # Seen with real engines on a busy machine: a whole short answer in one read.
        (2e-5, 9, None),
    ],
)
def test_time_between_tokens(seconds: float, events: int, expected: float | None) -> None:
    """A stream whose events were read together is no evidence of speed."""
    assert seconds_between_tokens(seconds, events) == expected
