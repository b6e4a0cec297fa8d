"""Spill gates: when they open and close, and which share of requests goes down."""

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.schema import Spill
from gateway.routing.spill import CLOSED, Home, SpillGate, abandoned, evaluate, evaluate_last, share_down

SPILL = Spill(after_seconds=2.0, return_below_seconds=0.5, dwell_seconds=10)
OPEN = SpillGate(spilling=True, since_seconds=0.0)
FREE = SpillGate(spilling=True, since_seconds=0.0, free_since_seconds=50.0)


@pytest.mark.parametrize(
    "gate, wait_seconds, now, spilling",
    [
        (CLOSED, 0.0, 0.0, False),
        (CLOSED, 2.0, 0.0, False),
        (CLOSED, 2.1, 0.0, True),
        (OPEN, 1.9, 99.0, True),
        # Free since this moment, however long the gate has spilled.
        (OPEN, 0.4, 99.0, True),
        (FREE, 0.4, 59.9, True),
        (FREE, 0.4, 60.0, False),
        (FREE, 0.5, 60.0, True),
    ],
)
def test_when_a_gate_opens_and_closes(gate: SpillGate, wait_seconds: float, now: float, spilling: bool) -> None:
    """A gate opens above `after_seconds`; it closes once the wait was below `return_below_seconds` for so long."""
    after, _ = evaluate(gate, SPILL, wait_seconds, now, "none")
    assert after.spilling is spilling
    assert after.since_seconds == (now if spilling is not gate.spilling else gate.since_seconds)


def test_a_rung_is_free_without_a_break() -> None:
    """A wait that is too long for a moment begins the dwell time anew."""
    gate, closed = OPEN, []
    for now in range(40):
        gate, _ = evaluate(gate, SPILL, 0.6 if now in {5, 14} else 0.1, float(now), "none")
        closed.append(not gate.spilling)
    assert closed.index(True) == 25


@pytest.mark.parametrize(
    "gate, home, after",
    [
        (CLOSED, "here", SpillGate(spilling=True, since_seconds=60.0)),
        # Who lives elsewhere loses nothing: a rung that never had a replica does not spill.
        (CLOSED, "none", CLOSED),
        (CLOSED, "below", CLOSED),
        (FREE, "below", OPEN),
        (OPEN, "here", OPEN),
    ],
)
def test_a_rung_without_a_replica(gate: SpillGate, home: Home, after: SpillGate) -> None:
    """Its gate opens for a conversation that lives there, which returns only when the rung has been free again."""
    assert abandoned(gate, 60.0, home) == after


@pytest.mark.parametrize(
    "wait_seconds, share", [(0.0, 0.0), (0.5, 0.0), (0.625, 0.25), (0.75, 0.5), (1.0, 1.0), (9.0, 1.0)]
)
def test_the_share_grows_with_the_wait(wait_seconds: float, share: float) -> None:
    """No new one at `return_below_seconds`, all at half of `after_seconds`; none while the gate is closed."""
    assert share_down(OPEN, SPILL, wait_seconds) == pytest.approx(share)
    assert share_down(CLOSED, SPILL, wait_seconds) == 0


def test_exactly_the_share_spills() -> None:
    """At a constant wait, exactly a quarter of a hundred requests spills, not a quarter on average."""
    gate, spilled = OPEN, 0
    for _ in range(100):
        gate, verdict = evaluate(gate, SPILL, 0.625, 1.0, "none")
        spilled += verdict == "spills"
    assert spilled == 25


@pytest.mark.parametrize(
    "home, gate, wait_seconds, verdict",
    [
        ("here", OPEN, 2.49, "answers"),
        ("here", CLOSED, 2.49, "answers"),
        ("here", OPEN, 2.51, "too_slow"),
        ("below", OPEN, 0.1, "keeps_below"),
        ("below", FREE, 0.1, "keeps_below"),
        ("below", CLOSED, 0.1, "answers"),
        ("below", OPEN, 3.0, "too_slow"),
        ("none", CLOSED, 1.99, "answers"),
        ("none", CLOSED, 2.01, "too_slow"),
        ("none", OPEN, 0.1, "answers"),
        ("none", OPEN, 1.99, "spills"),
    ],
)
def test_conversations_move_rarely(home: Home, gate: SpillGate, wait_seconds: float, verdict: str) -> None:
    """A conversation goes down only if its rung is much too slow, and up only once the gate is closed."""
    assert evaluate(gate, SPILL, wait_seconds, 51.0, home)[1] == verdict


@pytest.mark.parametrize("home, limit_seconds", [("none", 2.0), ("below", 2.0), ("here", 2.5)])
def test_the_last_rung(home: Home, limit_seconds: float) -> None:
    """It has no gate; a conversation that lives there waits longer before another rung is asked."""
    assert [evaluate_last(SPILL, limit_seconds + more, home) for more in (0.0, 0.1)] == ["answers", "too_slow"]


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
