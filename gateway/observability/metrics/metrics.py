"""The metrics that the gateway updates itself while it processes requests."""

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from prometheus_client import CollectorRegistry, ProcessCollector

from gateway.observability.metrics import table
from gateway.observability.metrics.instruments import MAX_HISTOGRAMS, Counter, Histogram, InstrumentCollector

UNKNOWN = "_unknown"  # label value that replaces every model name that is not configured


@dataclass(frozen=True, slots=True, eq=False)
class ServedMetrics:
    """Instruments of one alias answered by one variant, looked up once per request instead of once per token."""

    first_token: Histogram
    inter_token: Histogram
    request: Histogram
    queue: Histogram
    prompt_tokens: Counter
    completion_tokens: Counter
    reasoning_tokens: Counter


class Metrics:
    """All instruments of a gateway and the registry that `/metrics` exposes.

    An attribute is a family, to be used with `labels(...)`; of a metric without labels it is the only instrument.
    `per_key` says whether requests and tokens are counted by API key.
    """

    def __init__(self, *, per_key: bool = False) -> None:
        self.per_key = per_key
        self.registry = CollectorRegistry(auto_describe=True)
        self._served: dict[tuple[str, str, str], ServedMetrics] = {}
        instruments = InstrumentCollector()
        self.requests = instruments.counter(table.REQUESTS)
        self.in_flight = instruments.gauge(table.REQUESTS_IN_FLIGHT)
        self.tokens = instruments.counter(table.TOKENS)
        self.request_seconds = instruments.histogram(table.REQUEST_SECONDS)
        self.first_token_seconds = instruments.histogram(table.TIME_TO_FIRST_TOKEN_SECONDS)
        self.inter_token_seconds = instruments.histogram(table.INTER_TOKEN_LATENCY_SECONDS)
        self.overhead_seconds = instruments.histogram(table.OVERHEAD_SECONDS).labels()
        self.queue_seconds = instruments.histogram(table.QUEUE_SECONDS)
        self.rejections = instruments.counter(table.REJECTIONS)
        self.floor_rejections = instruments.counter(table.FLOOR_REJECTIONS)
        self.spills = instruments.counter(table.SPILLS)
        self.ladder_switches = instruments.counter(table.LADDER_SWITCHES)
        self.session_moves = instruments.counter(table.SESSION_MOVES)
        self.retries = instruments.counter(table.RETRIES)
        self.retries_refused = instruments.counter(table.RETRIES_REFUSED)
        self.external_cost_usd = instruments.counter(table.EXTERNAL_COST_USD)
        self.external_budget_usd = instruments.gauge(table.EXTERNAL_BUDGET_USD)
        self.external_spent_usd = instruments.gauge(table.EXTERNAL_SPENT_USD)
        self.client_retries = instruments.counter(table.CLIENT_RETRIES).labels()
        self.polls = instruments.counter(table.REPLICA_POLLS)
        self.heartbeats = instruments.counter(table.HEARTBEATS).labels()
        self.clients_cut = instruments.counter(table.CLIENTS_CUT)
        self.rollout_conversations = instruments.counter(table.ROLLOUT_CONVERSATIONS)
        self.rollout_rollbacks = instruments.counter(table.ROLLOUT_ROLLBACKS)
        self.key_requests = instruments.counter(table.KEY_REQUESTS)
        self.key_tokens = instruments.counter(table.KEY_TOKENS)
        self.quota_local = instruments.gauge(table.QUOTA_LOCAL).labels()
        self.usage_pending = instruments.gauge(table.USAGE_PENDING_REQUESTS).labels()
        self.usage_lost = instruments.counter(table.USAGE_LOST_REQUESTS).labels()
        self.reloads = instruments.counter(table.CONFIG_RELOADS)
        self.log_lines_dropped = instruments.counter(table.ACCESS_LOG_LINES_DROPPED).labels()
        self.loop_lag_seconds = instruments.histogram(table.EVENT_LOOP_LAG_SECONDS).labels()
        build_info = instruments.gauge(table.BUILD_INFO)
        build_info.labels(own_version(), platform.python_version()).value = 1.0
        self.registry.register(instruments)
        # process_cpu_seconds_total, process_open_fds and others, as in every Prometheus client library.
        ProcessCollector(registry=self.registry)

    def served(self, alias: str, variant: str, precision: str) -> ServedMetrics:
        """Return the instruments of an alias answered by a variant; the same object each time."""
        return self._served.get((alias, variant, precision)) or self._create_served(alias, variant, precision)

    def outcome(self, served: tuple[str, str, str], endpoint: str, code: str, reason: str) -> Counter:
        """Return the counter of completed requests; `served` is alias, variant and precision."""
        return self.requests.labels(*served, endpoint, code, reason)

    def rejected(self, alias: str, reason: str) -> None:
        """Count a request that was rejected before a replica was chosen.

        `alias` is UNKNOWN for a model that is not configured; `reason` comes from the code, never from an engine or a
        client. See `table.REJECTIONS` for the reasons.
        """
        self.rejections.labels(alias, reason).inc()

    def client_cut(self, reason: str) -> None:
        """Count a client connection that the gateway aborted."""
        self.clients_cut.labels(reason).inc()

    def completed_by(self, key: str, code: str, prompt_tokens: int, completion_tokens: int) -> None:
        """Count a completed request for its API key."""
        self.key_requests.labels(key, code).value += 1
        self.key_tokens.labels(key, "prompt").value += prompt_tokens
        self.key_tokens.labels(key, "completion").value += completion_tokens

    def _create_served(self, *labels: str) -> ServedMetrics:
        alias, variant, precision = labels
        served = ServedMetrics(
            self.first_token_seconds.labels(*labels),
            self.inter_token_seconds.labels(*labels),
            self.request_seconds.labels(*labels),
            self.queue_seconds.labels(alias),
            self.tokens.labels(*labels, "prompt"),
            self.tokens.labels(*labels, "completion"),
            self.tokens.labels(*labels, "reasoning"),
        )
        # Beyond the limit the histograms are shared `_other` ones: caching would only grow the dict.
        if len(self._served) < MAX_HISTOGRAMS:
            self._served[alias, variant, precision] = served
        return served


def own_version() -> str:
    """Return the version of the installed quantgate."""
    try:
        return version("quantgate")
    except PackageNotFoundError:  # a checkout that is not installed
        return "unknown"
