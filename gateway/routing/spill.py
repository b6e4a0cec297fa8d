"""The spill gate of a rung: when it sends requests to the rung below, and which of them.

========  ====================================================================  ========
state     event                                                                 next
========  ====================================================================  ========
closed    the wait rises above `after_seconds`                                  spilling
closed    a conversation that lives on the rung finds no replica there          spilling
spilling  the rung has been free for `dwell_seconds` without a break            closed
========  ====================================================================  ========

A rung is free while its wait is below `return_below_seconds`. While its gate spills,

- new conversations and requests without one go down first: a share that grows with the wait, none of them at
  `return_below_seconds`, all at FIRST_SHARE of `after_seconds`;
- a conversation that lives on the rung goes down only when the wait exceeds `after_seconds` LAST_SHARE times;
- a conversation that lives below stays there until the gate closes, whatever the wait is.

A conversation that has paused for PAUSE_SECONDS counts as a new one. Times are on the monotonic clock.
"""

from typing import Literal

import msgspec

from config.schema import Spill

# The room between the two is what keeps conversations where they are: the wait is held below the second by sending new
# ones down from the first.
FIRST_SHARE, LAST_SHARE = 0.5, 1.25
# Who comes back after so long hardly compares the answers, and the prompt is hardly cached any more.
PAUSE_SECONDS = 300.0


class SpillGate(msgspec.Struct, frozen=True, gc=False):
    """The gate of one rung of one alias: its state, since when, and the share of a request that is still to go down.

    `free_since_seconds` is None while the gate is closed, or the rung is not free.
    """

    spilling: bool = False
    since_seconds: float = 0.0
    owed: float = 0.0
    free_since_seconds: float | None = None


CLOSED = SpillGate()

RungKey = tuple[str, str]  # an alias, and the variant that is one of its rungs

# Where a conversation lives, seen from a rung: nowhere (or above it), on it, or below it.
Home = Literal["none", "here", "below"]
# `spills`: the rung could answer, but sends this request down so that its wait shrinks.
# `keeps_below`: it could answer, but leaves the conversation on the lower rung where it lives.
Verdict = Literal["answers", "spills", "keeps_below", "too_slow"]


def evaluate_last(spill: Spill, wait_seconds: float, home: Home) -> Verdict:
    """Evaluate a rung without its gate: none is below it, or the wait is one that only this request meets."""
    return "too_slow" if wait_seconds > longest_wait_seconds(spill, home) else "answers"


def evaluate(gate: SpillGate, spill: Spill, wait_seconds: float, now: float, home: Home) -> tuple[SpillGate, Verdict]:
    """Update a gate by the wait on its rung, and decide whether a request is answered there."""
    gate = update(gate, spill, wait_seconds, now)
    if wait_seconds > longest_wait_seconds(spill, home):
        return gate, "too_slow"
    if not gate.spilling or home == "here":
        return gate, "answers"
    if home == "below":
        return gate, "keeps_below"
    gate, goes = take_share(gate, share_down(gate, spill, wait_seconds))
    return gate, "spills" if goes else "answers"


def update(gate: SpillGate, spill: Spill, wait_seconds: float, now: float) -> SpillGate:
    """Open or close a gate by the wait on its rung; returns the same object if nothing changes."""
    if not gate.spilling:
        return SpillGate(True, now) if wait_seconds > spill.after_seconds else gate
    if wait_seconds >= spill.return_below_seconds:
        return occupied(gate)
    if gate.free_since_seconds is None:
        gate = SpillGate(True, gate.since_seconds, gate.owed, now)
    return SpillGate(False, now) if free_seconds(gate, now) >= spill.dwell_seconds else gate


def abandoned(gate: SpillGate, now: float, home: Home) -> SpillGate:
    """Update the gate of a rung that has no replica; returns the same object if nothing changes."""
    if not gate.spilling:
        return SpillGate(True, now) if home == "here" else gate
    return occupied(gate)


def occupied(gate: SpillGate) -> SpillGate:
    """The gate of a rung that is not free; the same object if it was not before."""
    return gate if gate.free_since_seconds is None else SpillGate(gate.spilling, gate.since_seconds, gate.owed)


def free_seconds(gate: SpillGate, now: float) -> float:
    """How long the rung of a gate that spills has been free without a break."""
    return 0.0 if gate.free_since_seconds is None else now - gate.free_since_seconds


def longest_wait_seconds(spill: Spill, home: Home) -> float:
    """The wait from which on a rung is too slow: later for a conversation that lives there."""
    return spill.after_seconds * LAST_SHARE if home == "here" else spill.after_seconds


def share_down(gate: SpillGate, spill: Spill, wait_seconds: float) -> float:
    """The share of new conversations, from 0 to 1, that goes down a rung."""
    if not gate.spilling or wait_seconds <= spill.return_below_seconds:
        return 0.0
    span_seconds = FIRST_SHARE * spill.after_seconds - spill.return_below_seconds
    return min((wait_seconds - spill.return_below_seconds) / span_seconds, 1.0) if span_seconds > 0 else 1.0


def take_share(gate: SpillGate, share: float) -> tuple[SpillGate, bool]:
    """Spill exactly `share` of requests over time, by accumulating the error; no randomness."""
    if not share:
        return gate, False
    owed = gate.owed + share
    goes = owed >= 1.0
    return SpillGate(gate.spilling, gate.since_seconds, owed - 1.0 if goes else owed, gate.free_since_seconds), goes
