"""Which rungs of which aliases spill: the only owner of the gates, whose rules are gateway.routing.spill'."""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet

from config.schema import Spill
from gateway.observability.metrics import Metrics
from gateway.routing.catalog import Target
from gateway.routing.cluster_state import GateName, Query
from gateway.routing.latency import LatencyEstimate
from gateway.routing.score import best_of
from gateway.routing.spill import SpillGate, update

ANYBODY = Query()


class SpillState:
    """Keeps a gate for each rung that has turned one, and counts when one opens or closes."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._gates: dict[GateName, SpillGate] = {}
        # Of those that spill, by their variants: with how each goes on.
        self._open: dict[str, dict[GateName, Spill]] = {}

    @property
    def gates(self) -> Mapping[GateName, SpillGate]:
        """Every gate; the same mapping for ever, always true."""
        return self._gates

    def turn(self, target: Target, gates: Mapping[GateName, SpillGate]) -> None:
        """Take over what a decision made of an alias' gates."""
        for name, gate in gates.items():
            self._set(name, gate, target.spill)

    def look(self, variant: str, outlooks: Sequence[LatencyEstimate], now: float) -> None:
        """Close gates whose rung has nothing to wait for any more, also while nobody asks for it."""
        spilling = self._open.get(variant)
        if not spilling:
            return
        for name, spill in [*spilling.items()]:
            best = best_of(outlooks, ANYBODY, spill)
            if best is not None and best.known:
                self._set(name, update(self._gates[name], spill, best.wait_seconds, now), spill)

    def keep_only(self, ladders: Mapping[str, AbstractSet[str]]) -> None:
        """Forget the gates of what is no rung of an alias any more: nothing would ever close them."""
        for name in [*self._gates]:
            alias, rung = name
            if rung not in ladders.get(alias, ()):
                del self._gates[name]
                self._open.get(rung, {}).pop(name, None)

    def _set(self, name: GateName, gate: SpillGate, spill: Spill) -> None:
        before = self._gates.get(name)
        self._gates[name] = gate
        if gate.spilling == (before is not None and before.spilling):
            return
        self._metrics.ladder_switches.labels(*name, "spill" if gate.spilling else "return").inc()
        if gate.spilling:
            self._open.setdefault(name[1], {})[name] = spill
        else:
            self._open.get(name[1], {}).pop(name, None)
