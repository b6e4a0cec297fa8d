"""Every Prometheus instrument of the gateway, over a registry of its own; labels come from the configuration only."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from config.variant import Variant
from serving.registry import Registry
from serving.replica import State

# vLLM's own edges (vllm/v1/metrics/buckets.py of 0.32), so that panels of engine and gateway line up.
FIRST_TOKEN_SECONDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560),
)
INTER_TOKEN_SECONDS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80),
)
REQUEST_SECONDS = (*(0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680),)
OVERHEAD_SECONDS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)

UNKNOWN = "_unknown"  # stands for any model name that a client made up


@dataclass(slots=True)
class Metrics:
    """The instruments, by what they tell."""

    registry: CollectorRegistry = field(default_factory=lambda: CollectorRegistry(auto_describe=True))
    requests: Counter = field(init=False)
    tokens: Counter = field(init=False)
    first_token_seconds: Histogram = field(init=False)
    inter_token_seconds: Histogram = field(init=False)
    request_seconds: Histogram = field(init=False)
    queue_seconds: Histogram = field(init=False)
    overhead_seconds: Histogram = field(init=False)
    in_flight: Gauge = field(init=False)
    retries: Counter = field(init=False)
    floor_rejections: Counter = field(init=False)
    reloads: Counter = field(init=False)
    heartbeats: Counter = field(init=False)
    retries_refused: Counter = field(init=False)

    def __post_init__(self) -> None:
        served = ("alias", "variant", "precision")
        self.requests = self._counter("requests", "Requests by outcome.", (*served, "endpoint", "code", "reason"))
        self.tokens = self._counter("tokens", "Tokens by kind: prompt, completion, reasoning.", (*served, "kind"))
        self.retries = self._counter("retries", "Attempts beyond a request's first.", ("alias", "code"))
        self.floor_rejections = self._counter(
            "floor_rejections", "Requests that no variant is good enough for.", ("alias",)
        )
        self.in_flight = Gauge(
            "quantgate_requests_in_flight", "Requests being answered.", ("endpoint",), registry=self.registry
        )
        self.first_token_seconds = self._histogram(
            "time_to_first_token", "From the request to its first token.", served, FIRST_TOKEN_SECONDS
        )
        self.inter_token_seconds = self._histogram(
            "inter_token_latency", "Between two streamed chunks.", served, INTER_TOKEN_SECONDS
        )
        self.request_seconds = self._histogram("request", "From a request to its last byte.", served, REQUEST_SECONDS)
        self.queue_seconds = self._histogram("queue", "Wait for a replica.", ("alias",), FIRST_TOKEN_SECONDS)
        self.overhead_seconds = self._histogram(
            "overhead", "Own time from a request to its being sent on, waiting left out.", (), OVERHEAD_SECONDS
        )

        self.heartbeats = self._counter("heartbeats", "Comments.", ())
        self.retries_refused = self._counter("retries_refused", "Retries not made.", ("alias", "reason"))
        self.reloads = self._counter("config_reloads", "Configurations taken over, refused or failed.", ("outcome",))

    def exposition(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, labels: tuple[str, ...]) -> Counter:
        return Counter(f"quantgate_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, labels: tuple[str, ...], buckets: Iterable[float]) -> Histogram:
        return Histogram(f"quantgate_{name}_seconds", text, labels, registry=self.registry, buckets=tuple(buckets))


@dataclass(frozen=True, slots=True, eq=False)
class FleetCollector(Collector):
    """Replicas and variants as they are when scraped; nothing is kept twice."""

    replicas: Registry
    variants: Callable[[], Iterable[Variant]]

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield state and load of every replica, and the quality of every variant."""
        labels = ("replica", "variant", "precision")
        state = GaugeMetricFamily(
            "quantgate_replica_state", "1 for the state that a replica is in.", labels=[*labels, "state"]
        )
        since = GaugeMetricFamily("quantgate_replica_state_seconds", "Time in its present state.", labels=labels)
        load = GaugeMetricFamily(
            "quantgate_replica_in_flight", "Requests that a replica is answering for us.", labels=labels
        )
        for status in self.replicas.snapshot():
            names = [status.replica.id, status.replica.variant, status.replica.precision]
            for possible in State:
                state.add_metric([*names, possible.value], float(possible is status.state))
            since.add_metric(names, time.monotonic() - status.since_seconds)
            load.add_metric(names, status.in_flight)
        yield from (state, since, load, self._quality())

    def _quality(self) -> GaugeMetricFamily:
        text = "Distance of a variant from its parent."
        quality = GaugeMetricFamily(
            "quantgate_variant_quality", text, labels=["variant", "precision", "measure", "source"]
        )
        for variant in self.variants():
            for measure in ("kl_mean", "top1_agreement", "perplexity_ratio"):
                value = getattr(variant.quality, measure)
                if value is not None:
                    quality.add_metric([variant.name, variant.precision, measure, variant.quality.source], value)
        return quality
