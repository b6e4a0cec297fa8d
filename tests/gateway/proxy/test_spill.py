"""Who owns the gates: they turn by decisions, close by themselves, and go with their aliases."""

from typing import Any

import msgspec
import pytest

from config.schema import NO_FLOOR, Spill
from config.variant import QualityMeasures, Variant
from gateway.observability.metrics import Metrics
from gateway.proxy.spill import SpillState
from gateway.routing.latency import LatencyEstimate
from gateway.routing.spill import SpillGate
from gateway.routing.target import Target
from serving.replica import Replica

HI, LO = (Variant(name, "any", QualityMeasures("unknown")) for name in ("hi", "lo"))
SPILL = Spill(after_seconds=2.0, return_below_seconds=0.5, dwell_seconds=10)
TARGET = Target("smol", (HI, LO), NO_FLOOR, pinned=False, spill=SPILL)
RUNG = ("smol", "hi")


def outlook(wait_seconds: float, **changes: Any) -> LatencyEstimate:
    """What a replica promises."""
    replica = Replica("hi-1", "hi", "any", "http://hi-1", "m1")
    told = LatencyEstimate(replica, "hi-1", True, True, True, False, 1, 1.0, wait_seconds=wait_seconds)
    return msgspec.structs.replace(told, fixed_seconds=wait_seconds, **changes)


def spilling(metrics: Metrics | None = None) -> SpillState:
    """One whose rung `hi` has spilled since 0."""
    made = SpillState(metrics or Metrics())
    made.turn(TARGET, {RUNG: SpillGate(spilling=True)})
    return made


def switches(metrics: Metrics) -> dict[str, float]:
    """How often gates opened and closed."""
    return {names[2]: count.value for names, count in metrics.ladder_switches.children.items()}


def test_turns_are_counted() -> None:
    """What a gate owes changes all the time, which is no turn."""
    metrics = Metrics()
    made = spilling(metrics)
    made.turn(TARGET, {RUNG: SpillGate(spilling=True, owed=0.5)})
    made.turn(TARGET, {RUNG: SpillGate(spilling=False)})
    assert switches(metrics) == {"spill": 1, "return": 1}
    assert not made.gates[RUNG].spilling


@pytest.mark.parametrize(
    "outlooks, now, open_still",
    [
        ([outlook(0.1)], 10.0, False),
        ([outlook(0.1)], 9.0, True),
        ([outlook(0.6)], 99.0, True),
        # A replica that nothing waits for, but that is so slow that nobody would go there, is no reason to return.
        ([outlook(1.9), outlook(0.0, answer_seconds=1.0)], 99.0, True),
        ([outlook(0.1, has_room=False)], 99.0, True),
        ([outlook(0.0, known=False)], 99.0, True),
        ([], 99.0, True),
    ],
)
def test_a_gate_closes_also_while_nobody_asks(outlooks: list[LatencyEstimate], now: float, open_still: bool) -> None:
    """By what a poll shows: else it would be told open for as long as the gateway is at rest."""
    metrics = Metrics()
    made = spilling(metrics)
    made.look("hi", outlooks, now)
    made.look("lo", outlooks, now)
    assert made.gates[RUNG].spilling is open_still
    assert switches(metrics) == {"spill": 1, **({} if open_still else {"return": 1})}
    made.look("hi", outlooks, now)
    assert sum(switches(metrics).values()) == (1 if open_still else 2)


def test_gates_go_with_their_aliases() -> None:
    """And with rungs that aren't theirs any more."""
    made = spilling()
    made.keep_only({"smol": {"hi", "lo"}})
    assert RUNG in made.gates
    made.keep_only({"smol": {"lo"}})
    made.look("hi", [outlook(0.0)], 99.0)
    assert dict(made.gates) == {}
