"""Metrics of the discovery of replicas in Kubernetes, computed at each scrape."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from gateway.observability.metrics import table
from serving.kubernetes.endpoints import STANDINGS
from serving.kubernetes.entry import SourceStatus
from serving.kubernetes.reflector import ERROR_REASONS, EVENT_TYPES


@dataclass(frozen=True, slots=True, eq=False)
class DiscoveryCollector(Collector):
    """Exposes what is known of each entry with `kubernetes`; those of one variant are added up."""

    statuses: Callable[[], Sequence[SourceStatus]]

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """Yield the families; called once per scrape."""
        by_variant = defaultdict[str, list[SourceStatus]](list)
        for status in self.statuses():
            by_variant[status.source.pod.variant].append(status)
        connected, lists = table.DISCOVERY_CONNECTED.gauge_family(), table.DISCOVERY_LISTS.counter_family()
        events, errors = table.DISCOVERY_EVENTS.counter_family(), table.DISCOVERY_ERRORS.counter_family()
        pods = table.DISCOVERY_PODS.gauge_family()
        for variant, statuses in by_variant.items():
            connected.add_metric([variant], float(all(each.outage is None for each in statuses)))
            lists.add_metric([variant], sum(each.counts.lists for each in statuses))
            for name in EVENT_TYPES:
                events.add_metric([variant, name], sum(each.counts.events[name] for each in statuses))
            for reason in ERROR_REASONS:
                errors.add_metric([variant, reason], sum(each.counts.errors[reason] for each in statuses))
            for standing in STANDINGS:
                pods.add_metric([variant, standing], sum(each.pods[standing] for each in statuses))
            pods.add_metric([variant, "unlisted"], sum(each.unlisted for each in statuses))
        yield from (connected, lists, events, errors, pods)
