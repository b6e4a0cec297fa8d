"""The division of the memory for bodies, and the time that a body has."""

import pytest

from gateway.http.interfaces import ClientTimeouts
from gateway.http.limits import SHORT_BODIES_SHARE, SHORT_BODY_BYTES, may_hold

MEMORY = 2**30
LARGE = SHORT_BODY_BYTES + 1


@pytest.mark.parametrize(
    "size, body, owner, used, fits",
    [
        (1, 0, None, MEMORY - 1, True),
        (2, 0, None, MEMORY - 1, False),
        (LARGE, 0, None, int(MEMORY * (1 - SHORT_BODIES_SHARE)) - LARGE, True),
        (LARGE, 0, None, int(MEMORY * (1 - SHORT_BODIES_SHARE)), False),
        (SHORT_BODY_BYTES, 0, None, int(MEMORY * (1 - SHORT_BODIES_SHARE)), True),
        (1, SHORT_BODY_BYTES, None, int(MEMORY * (1 - SHORT_BODIES_SHARE)), False),
        (MEMORY // 2, 0, 0, 0, True),
        (MEMORY // 2 + 1, 0, 0, 0, False),
        (1, 0, MEMORY // 2, MEMORY // 2, False),
        (1, 0, 0, MEMORY // 2, True),
        (MEMORY // 3, 0, 0, MEMORY // 3, True),
        (MEMORY // 3 + 2, 0, 0, MEMORY // 3, False),
    ],
)
def test_what_fits(size: int, body: int, owner: int | None, used: int, fits: bool) -> None:
    """Long bodies leave a part to short ones, and an owner as much as it holds to others."""
    assert may_hold(size, body, owner, used, MEMORY) == fits


@pytest.mark.parametrize(
    "pieces, stays_until",
    [
        ([(1.0, 1000)] * 500, 500.0),  # at the least rate, it stays for as long as a body may take
        ([(1.0, 900)] * 500, 291.0),  # slower, it loses a tenth of a second in each second
        ([(0.0, 1_000_000), *[(1.0, 1)] * 500], 30.0),  # what came fast at first is no credit for later
        ([(29.0, 100_000)] * 10, 290.0),  # pauses are fine
    ],
)
def test_the_time_of_a_body(pieces: list[tuple[float, int]], stays_until: float) -> None:
    """It ends when a body is 30 s behind its least rate, has been silent for 30 s, or has taken 500 s."""
    timeouts = ClientTimeouts(body_silence_seconds=30, body_seconds=500, body_bytes_per_second=1000)
    now, deadline = 0.0, 30.0
    for pause_seconds, size_bytes in pieces:
        if now + pause_seconds > deadline:
            break
        now += pause_seconds
        deadline = timeouts.body_deadline(deadline, size_bytes, now, until=500)
    assert now == pytest.approx(stays_until, abs=1)
