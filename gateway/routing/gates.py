"""When a rung of a ladder lets requests down to the next one, and how many of them.

    closed --(wait above `after_seconds`)--> spilling
    spilling --(wait below `return_below_seconds`, `dwell_seconds` after it opened)--> closed

While it spills, the share that goes down grows with the wait: none at `return_below_seconds`, all at `after_seconds`.
"""

from typing import Literal

import msgspec

from config.schema import Spill


class Gate(msgspec.Struct, frozen=True, gc=False):
    """One rung of one alias: whether it spills, since when (monotonic), and which share of a request it owes below."""

    spilling: bool = False
    since_seconds: float = 0.0
    owed: float = 0.0


CLOSED = Gate()


# Whose request it is: a new conversation's, one's that is answered on this rung, or one's that lives on a lower one.
Manner = Literal["new", "at home", "lives below"]
Verdict = Literal["answers", "goes", "too slow"]


def judged(spill: Spill, wait_seconds: float) -> Verdict:
    """Judge a rung that has no other below it."""
    return "too slow" if wait_seconds > spill.after_seconds else "answers"


def passed(gate: Gate, spill: Spill, wait_seconds: float, now: float, manner: Manner) -> tuple[Gate, Verdict]:
    """Say whether a request is answered on a rung: `goes` if it could be, and goes down for others' sake.

    A conversation changes rungs as rarely as can be: it leaves its own only if that is too slow, and comes back up only
    when nothing spills any more.
    """
    gate = turned(gate, spill, wait_seconds, now)
    if wait_seconds > spill.after_seconds:
        return gate, "too slow"
    if not gate.spilling or manner == "at home":
        return gate, "answers"
    if manner == "lives below":
        return gate, "goes"
    gate, goes = drawn(gate, share_down(gate, spill, wait_seconds))
    return gate, "goes" if goes else "answers"


def turned(gate: Gate, spill: Spill, wait_seconds: float, now: float) -> Gate:
    """Open or close a gate by the wait on its rung; nearly always it stays as it is."""
    if not gate.spilling:
        return Gate(True, now) if wait_seconds > spill.after_seconds else gate
    if wait_seconds < spill.return_below_seconds and now - gate.since_seconds >= spill.dwell_seconds:
        return Gate(False, now)
    return gate


def share_down(gate: Gate, spill: Spill, wait_seconds: float) -> float:
    """Which share of requests goes down a rung."""
    if not gate.spilling or wait_seconds <= spill.return_below_seconds:
        return 0.0
    span_seconds = spill.after_seconds - spill.return_below_seconds
    return min((wait_seconds - spill.return_below_seconds) / span_seconds, 1.0) if span_seconds > 0 else 1.0


def drawn(gate: Gate, share: float) -> tuple[Gate, bool]:
    """Decide whether it is this request that goes down, so that of many exactly the share does."""
    if not share:
        return gate, False
    owed = gate.owed + share
    goes = owed >= 1.0
    return Gate(gate.spilling, gate.since_seconds, owed - 1.0 if goes else owed), goes
