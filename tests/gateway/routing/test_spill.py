"""When a rung spills, how much, and how often that may change."""

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.schema import Spill
from gateway.routing.spill import CLOSED, Manner, SpillGate, evaluate, share_down

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
def test_when_a_gate_turns(gate: SpillGate, wait_seconds: float, now: float, spilling: bool) -> None:
    """It opens when the wait is too long, and closes when it is short again and some time has passed."""
    after, _ = evaluate(gate, SPILL, wait_seconds, now, "new")
    assert after.spilling is spilling
    assert after.since_seconds == (now if spilling is not gate.spilling else gate.since_seconds)


@pytest.mark.parametrize(
    "wait_seconds, share", [(0.0, 0.0), (0.5, 0.0), (0.875, 0.25), (1.25, 0.5), (2.0, 1.0), (9.0, 1.0)]
)
def test_the_share_grows_with_the_wait(wait_seconds: float, share: float) -> None:
    """None where the rung is quick again, all where it would be too slow; none at all while it doesn't spill."""
    assert share_down(OPEN, SPILL, wait_seconds) == pytest.approx(share)
    assert share_down(CLOSED, SPILL, wait_seconds) == 0


def test_exactly_the_share_goes() -> None:
    """Of many requests at the same wait, not just on average."""
    gate, goes = OPEN, 0
    for _ in range(100):
        gate, verdict = evaluate(gate, SPILL, 0.875, 1.0, "new")
        goes += verdict == "goes"
    assert goes == 25


@pytest.mark.parametrize(
    "manner, gate, wait_seconds, verdict",
    [
        ("at home", OPEN, 1.99, "answers"),
        ("at home", OPEN, 2.01, "too slow"),
        ("lives below", OPEN, 0.1, "goes"),
        ("lives below", CLOSED, 0.1, "answers"),
        ("lives below", OPEN, 3.0, "too slow"),
        ("new", CLOSED, 1.99, "answers"),
    ],
)
def test_conversations_move_rarely(manner: Manner, gate: SpillGate, wait_seconds: float, verdict: str) -> None:
    """Down only if their own rung is too slow, up only when nothing spills any more."""
    assert evaluate(gate, SPILL, wait_seconds, 1.0, manner)[1] == verdict


def test_equal_limits_are_no_division_by_zero() -> None:
    """All go down or none."""
    spill = Spill(after_seconds=1.0, return_below_seconds=1.0, dwell_seconds=0)
    assert Counter(evaluate(OPEN, spill, wait, 1.0, "new")[1] for wait in (0.9, 1.0, 1.1)) == {
        "answers": 2,
        "too slow": 1,
    }


@given(st.lists(st.tuples(st.floats(0, 3), st.floats(0, 10)), max_size=200))
def test_switches_are_bounded(steps: list[tuple[float, float]]) -> None:
    """Whatever the waits, a gate closes at most once in a dwell time, so it turns at most twice."""
    gate, now, returns = CLOSED, 0.0, []
    for pause_seconds, wait_seconds in steps:
        now += pause_seconds
        after, _ = evaluate(gate, SPILL, wait_seconds, now, "new")
        if gate.spilling and not after.spilling:
            returns.append(now)
        gate = after
    assert all(later - earlier >= SPILL.dwell_seconds for earlier, later in pairwise(returns))
