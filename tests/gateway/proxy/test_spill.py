"""The owner of the spill gates: decisions change them, polls close them, and they go with their aliases."""

from typing import Any

import msgspec
import pytest

from config.schema import NO_FLOOR, Spill
from config.variant import QualityMeasures, Variant
from gateway.observability.metrics import Metrics
from gateway.proxy.spill import SpillState
from gateway.routing.latency import LatencyEstimate
from gateway.routing.spill import PAUSE_SECONDS, SpillGate
from gateway.routing.target import Target

HI, LO = (Variant(name, "any", QualityMeasures("unknown")) for name in ("hi", "lo"))
SPILL = Spill(after_seconds=2.0, return_below_seconds=0.5, dwell_seconds=10)
TARGET = Target("smol", (HI, LO), NO_FLOOR, pinned=False, spill=SPILL)
RUNG = ("smol", "hi")


def estimate(wait_seconds: float, **changes: Any) -> LatencyEstimate:
    """The estimate of a replica with this wait."""
    idle = LatencyEstimate(
        "hi-1", "hi", has_room=True, known=True, measured=True, stale=False, in_flight=1, requests=1.0
    )
    return msgspec.structs.replace(idle, wait_seconds=wait_seconds, fixed_seconds=wait_seconds, **changes)


def spilling(metrics: Metrics | None = None) -> SpillState:
    """A state in which the rung `hi` has spilled since 0."""
    state = SpillState(metrics or Metrics())
    state.apply(TARGET, {RUNG: SpillGate(spilling=True)})
    return state


def switches(metrics: Metrics) -> dict[str, float]:
    """How often gates opened and closed."""
    return {names[2]: count.value for names, count in metrics.ladder_switches.children.items()}


def test_switches_are_counted() -> None:
    """A change of the owed share does not count as a switch."""
    metrics = Metrics()
    state = spilling(metrics)
    state.apply(TARGET, {RUNG: SpillGate(spilling=True, owed=0.5)})
    state.apply(TARGET, {RUNG: SpillGate(spilling=False)})
    assert switches(metrics) == {"spill": 1, "return": 1}
    assert not state.gates[RUNG].spilling


@pytest.mark.parametrize(
    "estimates, now, still_spilling",
    [
        ([estimate(0.1)], 10.0, False),
        ([estimate(0.1)], 9.0, True),
        ([estimate(0.6)], 99.0, True),
        # A replica without a wait, but so slow that no request would be sent there, does not close the gate.
        ([estimate(1.9), estimate(0.0, answer_seconds=1.0)], 99.0, True),
        ([estimate(0.1, has_room=False)], 99.0, True),
        ([estimate(0.0, known=False)], 99.0, True),
        ([], 99.0, True),
    ],
)
def test_a_gate_closes_without_requests(estimates: list[LatencyEstimate], now: float, still_spilling: bool) -> None:
    """Polls close it once its rung has been free for so long; otherwise it would stay open while no request arrives."""
    metrics = Metrics()
    state = spilling(metrics)
    state.observe("hi", estimates, 0.0)
    state.observe("hi", estimates, now)
    state.observe("lo", estimates, now)
    assert state.gates[RUNG].spilling is still_spilling
    assert switches(metrics) == {"spill": 1, **({} if still_spilling else {"return": 1})}
    state.observe("hi", estimates, now)
    assert sum(switches(metrics).values()) == (1 if still_spilling else 2)


def test_a_period_of_spilling_has_short_breaks() -> None:
    """It lasts from the first gate that opens until PAUSE_SECONDS after the last one has closed."""
    state, lower = SpillState(Metrics()), ("smol", "lo")
    assert state.spilled_lately_seconds("smol", lambda: 0.0) is None
    times = (10.0, RUNG, True), (20.0, lower, True), (30.0, RUNG, False), (40.0, lower, False)
    for since, key, opens in times:
        state.apply(TARGET, {key: SpillGate(opens, since)})
    end = 40.0 + PAUSE_SECONDS
    clock = iter((35.0, end - 1, end))
    lately = [state.spilled_lately_seconds("smol", clock.__next__) for _ in range(3)]
    assert lately == [25.0, end - 11, None]
    assert state.spilled_lately_seconds("other", lambda: 35.0) is None
    state.apply(TARGET, {RUNG: SpillGate(True, end + 5)})
    assert state.spilled_lately_seconds("smol", lambda: end + 6) == 1.0
    state.keep_only({"smol": {"other"}})
    assert state.spilled_lately_seconds("smol", lambda: end + 6) is None


def test_gates_are_forgotten_with_their_aliases() -> None:
    """And when their rung is not part of the ladder any more."""
    state = spilling()
    state.keep_only({"smol": {"hi", "lo"}})
    assert RUNG in state.gates
    state.keep_only({"smol": {"lo"}})
    state.observe("hi", [estimate(0.0)], 99.0)
    assert dict(state.gates) == {}
