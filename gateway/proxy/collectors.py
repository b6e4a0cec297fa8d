"""Metrics of the engines' load and of routing, computed at each scrape. An unknown value has no sample."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from gateway.observability.metrics import table
from gateway.routing.engine_metrics import WANTED, PollResult
from gateway.routing.latency import LatencyEstimate
from gateway.routing.speed import SpeedProfile
from gateway.routing.spill import SpillGate
from gateway.routing.target import Catalog
from serving.registry import Registry
from serving.replica import Replica

Polled = Sequence[tuple[Replica, PollResult]]


@dataclass(frozen=True, slots=True, eq=False)
class EngineCollector(Collector):
    """Exposes the latest polls of ready replicas' engines; `poll_results` returns them by replica id."""

    registry: Registry
    poll_results: Callable[[], Mapping[str, PollResult]]
    clock: Callable[[], float] = time.monotonic

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield the families; called once per scrape."""
        results = self.poll_results()
        replicas = [status.replica for status in self.registry.snapshot() if status.replica.id in results]
        polled = [(replica, results[replica.id]) for replica in replicas]
        yield _missing_metrics(polled)
        yield _poll_age(polled, self.clock())
        yield _engine_requests(polled)
        yield _kv_usage(polled)


def _missing_metrics(polled: Polled) -> GaugeMetricFamily:
    family = table.REPLICA_METRIC_MISSING.gauge_family()
    for replica, result in polled:
        if result.missing is None:
            continue
        for name in WANTED:
            labels = [replica.id, replica.variant, name.removeprefix("vllm:")]
            family.add_metric(labels, float(name in result.missing))
    return family


def _poll_age(polled: Polled, now: float) -> GaugeMetricFamily:
    family = table.REPLICA_POLL_AGE_SECONDS.gauge_family()
    for replica, result in polled:
        if result.polled_at is not None:
            family.add_metric([replica.id, replica.variant], now - result.polled_at)
    return family


def _engine_requests(polled: Polled) -> GaugeMetricFamily:
    family = table.REPLICA_ENGINE_REQUESTS.gauge_family()
    for replica, result in polled:
        if result.poll is None:
            continue
        for state, count in (("running", result.poll.running), ("waiting", result.poll.waiting)):
            if count is not None:
                family.add_metric([replica.id, replica.variant, state], count)
    return family


def _kv_usage(polled: Polled) -> GaugeMetricFamily:
    family = table.REPLICA_KV_USAGE_RATIO.gauge_family()
    for replica, result in polled:
        if result.poll is not None and result.poll.kv_usage is not None:
            family.add_metric([replica.id, replica.variant], result.poll.kv_usage)
    return family


@dataclass(frozen=True, slots=True, eq=False)
class LadderCollector(Collector):
    """Exposes which rungs spill, the estimated wait and the slots of each ready replica, and measured speeds.

    `gates` are by alias and variant; `estimates` returns those of a variant's ready replicas, `speeds` are by variant.
    """

    gates: Mapping[tuple[str, str], SpillGate]
    catalog: Callable[[], Catalog]
    variants: Callable[[], Iterable[str]]
    estimates: Callable[[str], Sequence[LatencyEstimate]]
    speeds: Callable[[], Mapping[str, SpeedProfile]]

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield the families; called once per scrape."""
        spilling = table.LADDER_SPILLING.gauge_family()
        open_gates = {place: gate.spilling for place, gate in self.gates.items()}
        for labels, is_open in {**dict.fromkeys(_upper_rungs(self.catalog()), False), **open_gates}.items():
            spilling.add_metric(labels, float(is_open))
        yield spilling
        yield from self._replicas()
        throughput = table.VARIANT_THROUGHPUT.gauge_family()
        for variant, speed in self.speeds().items():
            throughput.add_metric([variant], max(speed.together))
        yield throughput

    def _replicas(self) -> Iterator[GaugeMetricFamily]:
        wait, slots = table.REPLICA_WAIT_SECONDS.gauge_family(), table.REPLICA_SLOTS.gauge_family()
        load_unknown = table.REPLICA_LOAD_UNKNOWN.gauge_family()
        for variant in self.variants():
            for estimate in self.estimates(variant):
                labels = [estimate.id, variant]
                load_unknown.add_metric(labels, float(estimate.stale))
                if estimate.known:
                    wait.add_metric(labels, estimate.wait_seconds)
                if estimate.slots is not None:
                    slots.add_metric(labels, estimate.slots)
        yield from (wait, load_unknown, slots)


def _upper_rungs(catalog: Catalog) -> Iterator[tuple[str, str]]:
    """Yield alias and variant of each rung that has a lower one: it may spill."""
    for alias in catalog.aliases:
        for rung in catalog.resolve(alias).permitted[:-1]:
            yield alias, rung.name
