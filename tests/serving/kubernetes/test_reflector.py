"""How long a reflector waits before it asks again."""

from random import Random

import pytest

from serving.errors import ApiExpired, ApiServerAway, ApiThrottled
from serving.kubernetes.reflector import PAUSES, Outage, pause_seconds

AWAY, EXPIRED = ApiServerAway("away"), ApiExpired("too old")


@pytest.mark.parametrize(
    "error, failures, shortest, longest",
    [
        (None, 0, 0, 0),
        (None, 1, 0, 0),
        (None, 2, 0.25, 0.5),
        (EXPIRED, 1, 0, 0),
        (EXPIRED, 3, 0.5, 1),
        (AWAY, 0, 0.25, 0.5),
        (AWAY, 1, 0.25, 0.5),
        (AWAY, 4, 2, 4),
        (AWAY, 99, 15, 30),
        (ValueError("a defect"), 2, 0.5, 1),
        (ApiThrottled("too many", None), 1, 0.25, 0.5),
        (ApiThrottled("too many", 7.0), 1, 7, 7),
        (ApiThrottled("too many", 0.0), 1, 0.5, 0.5),
    ],
)
def test_pauses(error: Exception | None, failures: int, shortest: float, longest: float) -> None:
    """They grow from 0.5 to 30 s, with jitter; Retry-After decides where there is one."""
    found = [pause_seconds(PAUSES, failures, error, Random(seed)) for seed in range(100)]
    assert shortest <= min(found) <= max(found) <= longest
    assert (len(set(found)) > 1) == (shortest < longest)


def test_an_outage_says_since_when() -> None:
    """In UTC."""
    assert str(Outage("https://k: refused", 0.0)) == "https://k: refused (since 1970-01-01T00:00:00Z)"
