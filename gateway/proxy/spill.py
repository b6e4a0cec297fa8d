"""The spill gates of all aliases; the rules are gateway.routing.spill's."""

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from math import inf

from config.schema import NO_FLOOR, Spill
from gateway.observability.metrics import Metrics
from gateway.routing.latency import LatencyEstimate
from gateway.routing.pick import pick
from gateway.routing.request import RoutingRequest
from gateway.routing.spill import PAUSE_SECONDS, RungKey, SpillGate, update
from gateway.routing.target import Target

# A request without a prompt or a conversation: gates close by what it would meet.
ANY_REQUEST = RoutingRequest(Target("", (), NO_FLOOR, pinned=False), ())

NEVER = (0.0, 0.0)


class SpillState:
    """Owns a gate for each rung that has ever changed, and counts when one opens or closes."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._gates: dict[RungKey, SpillGate] = {}
        # The settings by which each closes, of those that spill.
        self._spilling: dict[RungKey, Spill] = {}
        # Since when, and until when, it matters where conversations begin, by alias.
        self._periods: dict[str, tuple[float, float]] = {}

    @property
    def gates(self) -> Mapping[RungKey, SpillGate]:
        """Every gate; a live view."""
        return self._gates

    def spilled_lately_seconds(self, alias: str, clock: Callable[[], float]) -> float | None:
        """How long rungs of an alias have spilled, with breaks of at most PAUSE_SECONDS; None if none did lately."""
        if not self._periods:
            return None
        now = clock()
        since, until = self._periods.get(alias, NEVER)
        return now - since if now < until else None

    def apply(self, target: Target, gates: Mapping[RungKey, SpillGate]) -> None:
        """Take over what a decision changed."""
        for key, gate in gates.items():
            self._set(key, gate, target.spill)

    def observe(self, variant: str, estimates: Sequence[LatencyEstimate], now: float) -> None:
        """Close the gates of a variant's rungs that no longer wait, so that they close also without requests."""
        for key, spill in [*self._spilling.items()]:
            best = pick(estimates, ANY_REQUEST, spill) if key[1] == variant else None
            if best is not None and best.known:
                self._set(key, update(self._gates[key], spill, best.wait_seconds, now), spill)

    def keep_only(self, ladders: Mapping[str, AbstractSet[str]]) -> None:
        """Forget the gates of rungs that are in no ladder any more; `ladders` are the names of rungs by alias."""
        for key in [*self._gates]:
            alias, rung = key
            if rung not in ladders.get(alias, ()):
                del self._gates[key]
                self._spilling.pop(key, None)
        spilling = {alias for alias, _ in self._spilling}
        # A period without an end is one of a gate.
        self._periods = {
            alias: (since, until)
            for alias, (since, until) in self._periods.items()
            if alias in (ladders if until < inf else spilling)
        }

    def _set(self, key: RungKey, gate: SpillGate, spill: Spill) -> None:
        before = self._gates.get(key)
        self._gates[key] = gate
        if gate.spilling == (before is not None and before.spilling):
            return
        self._metrics.ladder_switches.labels(*key, "spill" if gate.spilling else "return").inc()
        if gate.spilling:
            self._spilling[key] = spill
        else:
            self._spilling.pop(key, None)
        self._extend_period(key[0], gate.since_seconds)

    def _extend_period(self, alias: str, now: float) -> None:
        since, until = self._periods.get(alias, NEVER)
        spilling = any(name == alias for name, _ in self._spilling)
        self._periods[alias] = since if now < until else now, inf if spilling else now + PAUSE_SECONDS
