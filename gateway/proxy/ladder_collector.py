"""What decisions go by, read when Prometheus asks: which rungs spill, and how long replicas keep requests waiting."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from gateway.routing.latency import LatencyEstimate
from gateway.routing.spill import SpillGate


@dataclass(frozen=True, slots=True, eq=False)
class LadderCollector(Collector):
    """Gates by alias and variant, and the estimates of every variant's ready replicas."""

    gates: Mapping[tuple[str, str], SpillGate]
    variants: Callable[[], Iterator[str]]
    estimates: Callable[[str], Sequence[LatencyEstimate]]

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield what is known now; a replica of unknown speed has no wait."""
        text = "1 while a rung of an alias lets requests down to the next one."
        spilling = GaugeMetricFamily("quantgate_ladder_spilling", text, labels=("alias", "variant"))
        for names, gate in self.gates.items():
            spilling.add_metric(names, float(gate.spilling))
        yield spilling
        text = "How long one more request would wait for others on a replica."
        wait = GaugeMetricFamily("quantgate_replica_wait_seconds", text, labels=("replica", "variant"))
        text = "1 while nothing recent is known of what a replica does for others."
        stale = GaugeMetricFamily("quantgate_replica_load_unknown", text, labels=("replica", "variant"))
        for variant in self.variants():
            for outlook in self.estimates(variant):
                stale.add_metric([outlook.id, variant], float(outlook.stale))
                if outlook.known:
                    wait.add_metric([outlook.id, variant], outlook.wait_seconds)
        yield from (wait, stale)
