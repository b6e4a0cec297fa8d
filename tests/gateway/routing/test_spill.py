"""Spill gates: when they open and close, and which share of requests goes down."""

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.schema import Spill
from gateway.routing.spill import CLOSED, Home, SpillGate, evaluate, share_down

SPILL = Spill(after_seconds=2.0, return_below_seconds=0.5, dwell_seconds=10)
OPEN = SpillGate(spilling=True, since_seconds=0.0)


@pytest.mark.parametrize(
    "gate, wait_seconds, now, spilling",
    [
        (CLOSED, 0.0, 0.0, False),
        (CLOSED, 2.0, 0.0, False),
        (CLOSED, 2.1, 0.0, True),
        (OPEN, 1.9, 99.0, True),
        (OPEN, 0.4, 9.9, True),
        (OPEN, 0.4, 10.0, False),
        (OPEN, 0.5, 99.0, True),
    ],
)
def test_when_a_gate_opens_and_closes(gate: SpillGate, wait_seconds: float, now: float, spilling: bool) -> None:
    """A gate opens above `after_seconds`; it closes below `return_below_seconds`, once the dwell time has passed."""
    after, _ = evaluate(gate, SPILL, wait_seconds, now, "none")
    assert after.spilling is spilling
    assert after.since_seconds == (now if spilling is not gate.spilling else gate.since_seconds)


@pytest.mark.parametrize(
    "wait_seconds, share", [(0.0, 0.0), (0.5, 0.0), (0.875, 0.25), (1.25, 0.5), (2.0, 1.0), (9.0, 1.0)]
)
def test_the_share_grows_with_the_wait(wait_seconds: float, share: float) -> None:
    """No request at `return_below_seconds`, all at `after_seconds`; none while the gate is closed."""
    assert share_down(OPEN, SPILL, wait_seconds) == pytest.approx(share)
    assert share_down(CLOSED, SPILL, wait_seconds) == 0


def test_exactly_the_share_spills() -> None:
    """At a constant wait, exactly a quarter of a hundred requests spills, not a quarter on average."""
    gate, spilled = OPEN, 0
    for _ in range(100):
        gate, verdict = evaluate(gate, SPILL, 0.875, 1.0, "none")
        spilled += verdict == "spills"
    assert spilled == 25


@pytest.mark.parametrize(
    "home, gate, wait_seconds, verdict",
    [
        ("here", OPEN, 1.99, "answers"),
        ("here", OPEN, 2.01, "too_slow"),
        ("below", OPEN, 0.1, "spills"),
        ("below", CLOSED, 0.1, "answers"),
        ("below", OPEN, 3.0, "too_slow"),
        ("none", CLOSED, 1.99, "answers"),
    ],
)
def test_conversations_move_rarely(home: Home, gate: SpillGate, wait_seconds: float, verdict: str) -> None:
    """A conversation goes down only if its rung is too slow, and up only once the gate is closed."""
    assert evaluate(gate, SPILL, wait_seconds, 1.0, home)[1] == verdict


def test_equal_limits_are_no_division_by_zero() -> None:
    """Where both limits are equal, all requests go down or none."""
    spill = Spill(after_seconds=1.0, return_below_seconds=1.0, dwell_seconds=0)
    assert Counter(evaluate(OPEN, spill, wait, 1.0, "none")[1] for wait in (0.9, 1.0, 1.1)) == {
        "answers": 2,
        "too_slow": 1,
    }


@given(st.lists(st.tuples(st.floats(0, 3), st.floats(0, 10)), max_size=200))
def test_switches_are_bounded(steps: list[tuple[float, float]]) -> None:
    """For any waits, a gate closes at most once per dwell time."""
    gate, now, returns = CLOSED, 0.0, []
    for pause_seconds, wait_seconds in steps:
        now += pause_seconds
        after, _ = evaluate(gate, SPILL, wait_seconds, now, "none")
        if gate.spilling and not after.spilling:
            returns.append(now)
        gate = after
    assert all(later - earlier >= SPILL.dwell_seconds for earlier, later in pairwise(returns))
