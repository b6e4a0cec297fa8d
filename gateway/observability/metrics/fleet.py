"""Metrics of replicas and variants, computed from the registry at each scrape."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from config.variant import MEASURES, Variant
from gateway.observability.metrics import table
from gateway.observability.metrics.spec import MetricSpec
from serving.registry import Registry
from serving.replica import ReplicaStatus, State

BREAKER_STATES = ("closed", "half_open", "open")
SILENCE_STATES = ("responsive", "silent", "hung")


def no_breakers() -> Mapping[str, str]:
    """Breaker states of a gateway without circuit breakers."""
    return {}


def no_silences() -> Mapping[str, str]:
    """Silent replicas of a gateway that does not look for them."""
    return {}


def no_queue() -> Mapping[str, int]:
    """Queue lengths of a gateway without a queue."""
    return {}


def no_certificates() -> Mapping[str, float]:
    """Certificates of a gateway without TLS."""
    return {}


@dataclass(frozen=True, slots=True, eq=False)
class FleetCollector(Collector):
    """Exposes state, load, breaker and silence of each replica, the quality of each variant, and the queue lengths.

    `breaker_states` returns one of BREAKER_STATES by replica id; an absent replica is closed. `silences` returns one of
    SILENCE_STATES; an absent replica is responsive. `queue_lengths` returns the number of waiting requests by alias,
    `certificates` when those of this gateway expire, by file.
    """

    registry: Registry
    variants: Callable[[], Iterable[Variant]]
    breaker_states: Callable[[], Mapping[str, str]] = no_breakers
    queue_lengths: Callable[[], Mapping[str, int]] = no_queue
    silences: Callable[[], Mapping[str, str]] = no_silences
    certificates: Callable[[], Mapping[str, float]] = no_certificates

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield the families; called once per scrape."""
        snapshot = self.registry.snapshot()
        yield from _replicas(snapshot)
        yield _current(table.REPLICA_BREAKER, BREAKER_STATES, snapshot, self.breaker_states())
        yield _current(table.REPLICA_SILENCE, SILENCE_STATES, snapshot, self.silences())
        yield from self._quality()
        yield _sizes(self.variants())
        waiting = table.WAITING.gauge_family()
        for alias, count in self.queue_lengths().items():
            waiting.add_metric([alias], count)
        yield waiting
        yield _certificates(snapshot, self.certificates())

    def _quality(self) -> tuple[GaugeMetricFamily, GaugeMetricFamily]:
        values, bounds = table.VARIANT_QUALITY.gauge_family(), table.VARIANT_QUALITY_BOUND.gauge_family()
        for variant in self.variants():
            for measure in MEASURES:
                value, bound = getattr(variant.quality, measure), variant.quality.bound(measure)
                labels = [variant.name, variant.precision, measure, variant.quality.source]
                if value is not None and bound is not None:
                    values.add_metric(labels, value)
                    bounds.add_metric(labels, bound)
        return values, bounds


def _current(
    spec: MetricSpec, states: Sequence[str], snapshot: Iterable[ReplicaStatus], current: Mapping[str, str]
) -> GaugeMetricFamily:
    """A sample for each replica and state; a replica that is not in `current` is in the first state."""
    family = spec.gauge_family()
    for status in snapshot:
        replica = status.replica
        for state in states:
            labels = [replica.id, replica.variant, state]
            family.add_metric(labels, float(state == current.get(replica.id, states[0])))
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


def _sizes(variants: Iterable[Variant]) -> GaugeMetricFamily:
    family = table.VARIANT_SIZE_BYTES.gauge_family()
    for variant in variants:
        if variant.manifest is not None:
            family.add_metric([variant.name, variant.precision], variant.manifest.bytes)
    return family


def _certificates(snapshot: Iterable[ReplicaStatus], own: Mapping[str, float]) -> GaugeMetricFamily:
    family = table.CERTIFICATE_EXPIRATION_SECONDS.gauge_family()
    expirations = {
        file: seconds for status in snapshot if status.replica.tls for file, seconds in status.replica.tls.expirations
    }
    for file, seconds in (expirations | dict(own)).items():
        family.add_metric([file], seconds)
    return family
