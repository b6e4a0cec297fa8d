"""The spill gates of all aliases; the rules are gateway.routing.spill's."""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from math import inf

from config.schema import NO_FLOOR, Spill
from gateway.observability.metrics import Metrics
from gateway.routing.latency import LatencyEstimate
from gateway.routing.pick import pick
from gateway.routing.request import RoutingRequest
from gateway.routing.spill import PAUSE_SECONDS, SpillGate, update
from gateway.routing.split import RungKey
from gateway.routing.target import Target

# A request without a prompt or a conversation: gates close by what it would meet.
ANY_REQUEST = RoutingRequest(Target("", (), NO_FLOOR, pinned=False), ())


class SpillState:
    """Owns a gate for each rung that has ever changed, and counts when one opens or closes."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._gates: dict[RungKey, SpillGate] = {}
        # Those that spill, with the variants of their rungs and the settings by which each closes.
        self._spilling: dict[RungKey, tuple[tuple[str, ...], Spill]] = {}
        # Until when conversations that begin matter to a rung that may spill again, by alias.
        self._until: dict[str, float] = {}

    @property
    def gates(self) -> Mapping[RungKey, SpillGate]:
        """Every gate; a live view."""
        return self._gates

    def spilled_lately(self, alias: str, now: float) -> bool:
        """Return whether any rung of an alias spills, or has stopped within PAUSE_SECONDS."""
        return now < self._until.get(alias, 0.0)

    def apply(self, target: Target, gates: Mapping[RungKey, SpillGate]) -> None:
        """Take over what a decision changed."""
        for key, gate in gates.items():
            names = next((rung.names for rung in target.rungs if rung.name == key[1]), ())
            self._set(key, gate, names, target.spill)

    def observe(self, variant: str, estimates: Sequence[LatencyEstimate], now: float) -> None:
        """Close the gates of a variant's rungs that no longer wait, so that they close also without requests."""
        for key, (names, spill) in [*self._spilling.items()]:
            best = pick(estimates, ANY_REQUEST, spill) if variant in names else None
            if best is not None and best.known:
                self._set(key, update(self._gates[key], spill, best.wait_seconds, now), names, spill)

    def keep_only(self, ladders: Mapping[str, AbstractSet[str]]) -> None:
        """Forget the gates of rungs that are in no ladder any more; `ladders` are the names of rungs by alias."""
        for key in [*self._gates]:
            alias, rung = key
            if rung not in ladders.get(alias, ()):
                del self._gates[key]
                self._spilling.pop(key, None)
        self._until = {alias: until for alias, until in self._until.items() if alias in ladders}

    def _set(self, key: RungKey, gate: SpillGate, names: tuple[str, ...], spill: Spill) -> None:
        before = self._gates.get(key)
        self._gates[key] = gate
        if gate.spilling == (before is not None and before.spilling):
            return
        self._metrics.ladder_switches.labels(*key, "spill" if gate.spilling else "return").inc()
        if gate.spilling:
            self._spilling[key] = names, spill
        else:
            self._spilling.pop(key, None)
        alias = key[0]
        others = any(spilling == alias for spilling, _ in self._spilling)
        self._until[alias] = inf if others else gate.since_seconds + PAUSE_SECONDS
