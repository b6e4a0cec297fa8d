"""The division of the memory for bodies."""

import pytest

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
