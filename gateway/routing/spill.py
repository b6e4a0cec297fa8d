"""When a rung of a ladder lets requests down to the next one, and how many of them.

    closed --(wait above `after_seconds`)--> spilling
    spilling --(wait below `return_below_seconds`, `dwell_seconds` after it opened)--> closed

While it spills, the share that goes down grows with the wait: none at `return_below_seconds`, all at `after_seconds`.
"""

from typing import Literal

import msgspec

from config.schema import Spill


class SpillGate(msgspec.Struct, frozen=True, gc=False):
    """One rung of one alias: whether it spills, since when (monotonic), and which share of a request it owes below."""

    spilling: bool = False
    since_seconds: float = 0.0
    owed: float = 0.0


CLOSED = SpillGate()


# Whose request it is: a new conversation's, one's that is answered on this rung, or one's that lives on a lower one.
Manner = Literal["new", "at home", "lives below"]
Verdict = Literal["answers", "goes", "too slow"]


def evaluate_last(spill: Spill, wait_seconds: float) -> Verdict:
    """Judge a rung that has no other below it."""
    return "too slow" if wait_seconds > spill.after_seconds else "answers"


def evaluate(
    gate: SpillGate, spill: Spill, wait_seconds: float, now: float, manner: Manner
) -> tuple[SpillGate, Verdict]:
    """Say whether a request is answered on a rung: `goes` if it could be, and goes down for others' sake.

    A conversation changes rungs as rarely as can be: it leaves its own only if that is too slow, and comes back up only
    when nothing spills any more.
    """
    gate = update(gate, spill, wait_seconds, now)
    if wait_seconds > spill.after_seconds:
        return gate, "too slow"
    if not gate.spilling or manner == "at home":
        return gate, "answers"
    if manner == "lives below":
        return gate, "goes"
    gate, goes = take_share(gate, share_down(gate, spill, wait_seconds))
    return gate, "goes" if goes else "answers"


def update(gate: SpillGate, spill: Spill, wait_seconds: float, now: float) -> SpillGate:
    """Open or close a gate by the wait on its rung; nearly always it stays as it is."""
    if not gate.spilling:
        return SpillGate(True, now) if wait_seconds > spill.after_seconds else gate
    if wait_seconds < spill.return_below_seconds and now - gate.since_seconds >= spill.dwell_seconds:
        return SpillGate(False, now)
    return gate


def share_down(gate: SpillGate, spill: Spill, wait_seconds: float) -> float:
    """Which share of requests goes down a rung."""
    if not gate.spilling or wait_seconds <= spill.return_below_seconds:
        return 0.0
    span_seconds = spill.after_seconds - spill.return_below_seconds
    return min((wait_seconds - spill.return_below_seconds) / span_seconds, 1.0) if span_seconds > 0 else 1.0


def take_share(gate: SpillGate, share: float) -> tuple[SpillGate, bool]:
    """Decide whether it is this request that goes down, so that of many exactly the share does."""
    if not share:
        return gate, False
    owed = gate.owed + share
    goes = owed >= 1.0
    return SpillGate(gate.spilling, gate.since_seconds, owed - 1.0 if goes else owed), goes
