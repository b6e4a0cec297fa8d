"""Metrics of replicas and variants, computed from the registry at each scrape."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from config.variant import MEASURES, Variant
from gateway.observability.metrics import table
from serving.registry import Registry
from serving.replica import ReplicaStatus, State

BREAKER_STATES = ("closed", "half_open", "open")


def no_breakers() -> Mapping[str, str]:
    """Breaker states of a gateway without circuit breakers."""
    return {}


def no_queue() -> Mapping[str, int]:
    """Queue lengths of a gateway without a queue."""
    return {}


@dataclass(frozen=True, slots=True, eq=False)
class FleetCollector(Collector):
    """Exposes state, load and breaker of each replica, the quality of each variant, and the queue lengths.

    `breaker_states` returns one of BREAKER_STATES by replica id; an absent replica is closed. `queue_lengths` returns
    the number of waiting requests by alias.
    """

    registry: Registry
    variants: Callable[[], Iterable[Variant]]
    breaker_states: Callable[[], Mapping[str, str]] = no_breakers
    queue_lengths: Callable[[], Mapping[str, int]] = no_queue

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield the families; called once per scrape."""
        snapshot = self.registry.snapshot()
        yield from _replicas(snapshot)
        yield self._breakers(snapshot)
        yield self._quality()
        waiting = table.WAITING.gauge_family()
        for alias, count in self.queue_lengths().items():
            waiting.add_metric([alias], count)
        yield waiting
        yield _certificates(snapshot)

    def _breakers(self, snapshot: Iterable[ReplicaStatus]) -> GaugeMetricFamily:
        family = table.REPLICA_BREAKER.gauge_family()
        states = self.breaker_states()
        for status in snapshot:
            replica = status.replica
            current = states.get(replica.id, "closed")
            for state in BREAKER_STATES:
                family.add_metric([replica.id, replica.variant, state], float(state == current))
        return family

    def _quality(self) -> GaugeMetricFamily:
        family = table.VARIANT_QUALITY.gauge_family()
        for variant in self.variants():
            for measure in MEASURES:
                value = getattr(variant.quality, measure)
                if value is not None:
                    family.add_metric([variant.name, variant.precision, measure, variant.quality.source], value)
        return family


def _replicas(snapshot: Iterable[ReplicaStatus]) -> Iterator[GaugeMetricFamily]:
    states = table.REPLICA_STATE.gauge_family()
    state_seconds = table.REPLICA_STATE_SECONDS.gauge_family()
    in_flight = table.REPLICA_IN_FLIGHT.gauge_family()
    for status in snapshot:
        labels = [status.replica.id, status.replica.variant, status.replica.precision]
        for state in State:
            states.add_metric([*labels, state.value], float(state is status.state))
        state_seconds.add_metric(labels, time.monotonic() - status.since_seconds)
        in_flight.add_metric(labels, status.in_flight)
    yield from (states, state_seconds, in_flight)


def _certificates(snapshot: Iterable[ReplicaStatus]) -> GaugeMetricFamily:
    family = table.CERTIFICATE_EXPIRATION_SECONDS.gauge_family()
    expirations = {
        file: seconds for status in snapshot if status.replica.tls for file, seconds in status.replica.tls.expirations
    }
    for file, seconds in expirations.items():
        family.add_metric([file], seconds)
    return family
