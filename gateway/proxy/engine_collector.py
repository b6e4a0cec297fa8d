"""What replicas' engines say of their load, read when Prometheus asks; what isn't known has no sample."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from gateway.routing.engine_metrics import WANTED, PollResult
from serving.registry import Registry
from serving.replica import Replica

LABELS = ("replica", "variant")


@dataclass(frozen=True, slots=True, eq=False)
class EngineCollector(Collector):
    """The engines of ready replicas; `seen` gives what polls have shown by replica id."""

    replicas: Registry
    seen: Callable[[], Mapping[str, PollResult]]
    clock: Callable[[], float] = time.monotonic

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield what was polled, how old it is, and what was not to be found."""
        known = [(status.replica, self.seen().get(status.replica.id)) for status in self.replicas.snapshot()]
        polled = [(replica, seen) for replica, seen in known if seen is not None]
        yield _missing(polled)
        yield self._age(polled)
        yield from _load(polled)

    def _age(self, polled: list[tuple[Replica, PollResult]]) -> GaugeMetricFamily:
        text = "Time since a replica was last asked for its load, and told it."
        age = GaugeMetricFamily("quantgate_replica_poll_age_seconds", text, labels=LABELS)
        now = self.clock()
        for replica, seen in polled:
            if seen.polled_at is not None:
                age.add_metric([replica.id, replica.variant], now - seen.polled_at)
        return age


def _missing(polled: list[tuple[Replica, PollResult]]) -> GaugeMetricFamily:
    text = "1 for a metric that a replica's engine should have and hasn't: vLLM may have renamed it."
    missing = GaugeMetricFamily("quantgate_replica_metric_missing", text, labels=[*LABELS, "metric"])
    for replica, seen in polled:
        if seen.missing is None:
            continue
        for name in WANTED:
            labels = [replica.id, replica.variant, name.removeprefix("vllm:")]
            missing.add_metric(labels, float(name in seen.missing))
    return missing


def _load(polled: list[tuple[Replica, PollResult]]) -> Iterator[GaugeMetricFamily]:
    text = "Requests in a replica's engine, whoever sent them."
    requests = GaugeMetricFamily("quantgate_replica_engine_requests", text, labels=[*LABELS, "state"])
    text = "Share of a replica's KV cache that is taken."
    kv_usage = GaugeMetricFamily("quantgate_replica_kv_usage_ratio", text, labels=LABELS)
    for replica, seen in polled:
        if seen.poll is None:
            continue
        names = [replica.id, replica.variant]
        for state, count in (("running", seen.poll.running), ("waiting", seen.poll.waiting)):
            if count is not None:
                requests.add_metric([*names, state], count)
        if seen.poll.kv_usage is not None:
            kv_usage.add_metric(names, seen.poll.kv_usage)
    yield from (requests, kv_usage)
