"""The spill gate of a rung: when it sends requests to the rung below, and which share of them.

========  =================================================================  ========
state     event                                                              next
========  =================================================================  ========
closed    the wait rises above `after_seconds`                               spilling
spilling  the wait is below `return_below_seconds`, `dwell_seconds` passed   closed
========  =================================================================  ========

While a gate spills, the share that goes down grows with the wait: none at `return_below_seconds`, all at
`after_seconds`. Times are on the monotonic clock.
"""

from typing import Literal

import msgspec

from config.schema import Spill


class SpillGate(msgspec.Struct, frozen=True, gc=False):
    """The gate of one rung of one alias: its state, since when, and the share of a request that is still to go down."""

    spilling: bool = False
    since_seconds: float = 0.0
    owed: float = 0.0


CLOSED = SpillGate()

# Where a conversation lives, seen from a rung: nowhere (or above it), on it, or below it.
Home = Literal["none", "here", "below"]
# `spills`: the rung could answer, but sends this request down so that its wait shrinks.
Verdict = Literal["answers", "spills", "too_slow"]


def evaluate_last(spill: Spill, wait_seconds: float) -> Verdict:
    """Evaluate a rung that has no gate, because none is below it."""
    return "too_slow" if wait_seconds > spill.after_seconds else "answers"


def evaluate(gate: SpillGate, spill: Spill, wait_seconds: float, now: float, home: Home) -> tuple[SpillGate, Verdict]:
    """Update a gate by the wait on its rung, and decide whether a request is answered there.

    A conversation changes rungs as rarely as possible: it leaves its own only if that is too slow, and comes back up
    only when nothing spills any more.
    """
    gate = update(gate, spill, wait_seconds, now)
    if wait_seconds > spill.after_seconds:
        return gate, "too_slow"
    if not gate.spilling or home == "here":
        return gate, "answers"
    if home == "below":
        return gate, "spills"
    gate, goes = take_share(gate, share_down(gate, spill, wait_seconds))
    return gate, "spills" if goes else "answers"


def update(gate: SpillGate, spill: Spill, wait_seconds: float, now: float) -> SpillGate:
    """Open or close a gate by the wait on its rung; returns the same object if nothing changes."""
    if not gate.spilling:
        return SpillGate(True, now) if wait_seconds > spill.after_seconds else gate
    if wait_seconds < spill.return_below_seconds and now - gate.since_seconds >= spill.dwell_seconds:
        return SpillGate(False, now)
    return gate


def share_down(gate: SpillGate, spill: Spill, wait_seconds: float) -> float:
    """The share of requests, from 0 to 1, that goes down a rung."""
    if not gate.spilling or wait_seconds <= spill.return_below_seconds:
        return 0.0
    span_seconds = spill.after_seconds - spill.return_below_seconds
    return min((wait_seconds - spill.return_below_seconds) / span_seconds, 1.0) if span_seconds > 0 else 1.0


def take_share(gate: SpillGate, share: float) -> tuple[SpillGate, bool]:
    """Spill exactly `share` of requests over time, by accumulating the error; no randomness."""
    if not share:
        return gate, False
    owed = gate.owed + share
    goes = owed >= 1.0
    return SpillGate(gate.spilling, gate.since_seconds, owed - 1.0 if goes else owed), goes
