"""Replicas and variants, read when Prometheus asks: nothing is kept twice."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from config.variant import MEASURES, Variant
from serving.registry import Registry
from serving.replica import ReplicaStatus, State

BREAKER_STATES = ("closed", "half_open", "open")


def all_closed() -> Mapping[str, str]:
    """The breakers of a gateway that has none."""
    return {}


def none_waiting() -> Mapping[str, int]:
    """The lines of a gateway that has none."""
    return {}


@dataclass(frozen=True, slots=True, eq=False)
class FleetCollector(Collector):
    """Replicas and variants as they are when scraped.

    `breakers` gives one of BREAKER_STATES by replica id; who isn't in it is closed. `waiting` counts by alias.
    """

    replicas: Registry
    variants: Callable[[], Iterable[Variant]]
    breakers: Callable[[], Mapping[str, str]] = all_closed
    waiting: Callable[[], Mapping[str, int]] = none_waiting

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield state, load and breaker of every replica, and the quality of every variant."""
        snapshot = self.replicas.snapshot()
        yield from self._states(snapshot)
        yield self._breakers(snapshot)
        yield self._quality()
        waiting = GaugeMetricFamily("quantgate_waiting", "Requests that wait for a replica.", labels=["alias"])
        for alias, count in self.waiting().items():
            waiting.add_metric([alias], count)
        yield waiting

    def _states(self, snapshot: Iterable[ReplicaStatus]) -> Iterator[GaugeMetricFamily]:
        labels = ("replica", "variant", "precision")
        state = GaugeMetricFamily(
            "quantgate_replica_state", "1 for the state that a replica is in.", labels=[*labels, "state"]
        )
        since = GaugeMetricFamily("quantgate_replica_state_seconds", "Time in its present state.", labels=labels)
        load = GaugeMetricFamily(
            "quantgate_replica_in_flight", "Requests that a replica is answering for us.", labels=labels
        )
        for status in snapshot:
            names = [status.replica.id, status.replica.variant, status.replica.precision]
            for possible in State:
                state.add_metric([*names, possible.value], float(possible is status.state))
            since.add_metric(names, time.monotonic() - status.since_seconds)
            load.add_metric(names, status.in_flight)
        yield from (state, since, load)

    def _breakers(self, snapshot: Iterable[ReplicaStatus]) -> GaugeMetricFamily:
        text, labels = "1 for the state that a replica's breaker is in.", ("replica", "variant", "state")
        breaker = GaugeMetricFamily("quantgate_replica_breaker", text, labels=labels)
        states = self.breakers()
        for status in snapshot:
            now = states.get(status.replica.id, "closed")
            for possible in BREAKER_STATES:
                breaker.add_metric([status.replica.id, status.replica.variant, possible], float(possible == now))
        return breaker

    def _quality(self) -> GaugeMetricFamily:
        text = "Distance of a variant from its parent."
        quality = GaugeMetricFamily(
            "quantgate_variant_quality", text, labels=["variant", "precision", "measure", "source"]
        )
        for variant in self.variants():
            for measure in MEASURES:
                value = getattr(variant.quality, measure)
                if value is not None:
                    quality.add_metric([variant.name, variant.precision, measure, variant.quality.source], value)
        return quality
