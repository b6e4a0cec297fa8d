"""Every series that the gateway itself feeds. Label values come from the configuration, or from a set in the code."""

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from prometheus_client import CollectorRegistry

from gateway.observability.metrics.instruments import MAX_HISTOGRAMS, Counter, Histogram, Instruments

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

# Why a request was turned away before any replica saw it; whatever else an error calls itself is `other`.
REJECTIONS = frozenset(
    {
        *("rate_limit", "queue_full", "queue_timeout", "draining", "too_large", "too_slow", "not_allowed"),
        *("invalid_key", "invalid_request", "unknown_model", "floor", "no_replica"),
    }
)


@dataclass(frozen=True, slots=True, eq=False)
class Served:
    """What is fed for one alias as answered by one variant."""

    first_token: Histogram
    inter_token: Histogram
    request: Histogram
    prompt_tokens: Counter
    completion_tokens: Counter
    reasoning_tokens: Counter


class Metrics:
    """The instruments, by what they tell; of a metric without labels the only child."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry(auto_describe=True)
        self._served: dict[tuple[str, str, str], Served] = {}
        made = Instruments()
        served = ("alias", "variant", "precision")
        # Requests
        self.requests = made.counter("requests", "Requests by outcome.", *served, "endpoint", "code", "reason")
        self.tokens = made.counter("tokens", "Tokens by kind: prompt, completion, reasoning.", *served, "kind")
        self.in_flight = made.gauge("requests_in_flight", "Requests being answered.", "endpoint")
        self.first_token_seconds = made.histogram(
            "time_to_first_token_seconds", "From the request to its first token.", FIRST_TOKEN_SECONDS, *served
        )
        self.inter_token_seconds = made.histogram(
            "inter_token_latency_seconds", "Between two streamed chunks.", INTER_TOKEN_SECONDS, *served
        )
        self.request_seconds = made.histogram(
            "request_seconds", "From a request to its last byte.", REQUEST_SECONDS, *served
        )
        self.overhead_seconds = made.histogram(
            "overhead_seconds",
            "Own time from a request to its being sent on, waiting left out.",
            OVERHEAD_SECONDS,
        ).labels()
        # Waiting, and turning away
        self.queue_seconds = made.histogram("queue_seconds", "Wait for a replica.", FIRST_TOKEN_SECONDS, "alias")
        self.rejections = made.counter("rejections", "Requests turned away by the gateway itself.", "alias", "reason")
        self.floor_rejections = made.counter(
            "floor_rejections", "Requests that no variant is good enough for.", "alias"
        )
        self.spills = made.counter("spills", "Requests that a lower rung answers, to be quicker.", "alias", "variant")
        self.ladder_switches = made.counter(
            "ladder_switches", "Times that a rung began to spill, or stopped.", "alias", "variant", "to"
        )
        self.session_moves = made.counter(
            "session_moves", "Conversations that went on with another rung's variant.", "alias", "direction"
        )
        # Trying again
        self.retries = made.counter("retries", "Attempts beyond a request's first.", "alias", "code")
        self.retries_refused = made.counter(
            "retries_refused", "Failed requests that were not tried again, by why not.", "alias", "reason"
        )
        self.client_retries = made.counter("client_retries", "Requests that a client's SDK sent again.").labels()
        # Replicas
        self.polls = made.counter(
            "replica_polls", "Looks at a replica's own metrics, by what came of them.", "replica", "variant", "outcome"
        )
        # Clients
        self.heartbeats = made.counter("heartbeats", "Comments sent to keep silent streams open.").labels()
        self.clients_cut = made.counter("clients_cut", "Clients whose connection the gateway closed.", "reason")
        # The process
        self.reloads = made.counter("config_reloads", "Configurations taken over, refused or failed.", "outcome")
        self.log_lines_dropped = made.counter("access_log_lines_dropped", "Lines that nobody read in time.").labels()
        self.loop_lag_seconds = made.histogram(
            "event_loop_lag_seconds", "How much later than asked for the event loop woke a task.", OVERHEAD_SECONDS
        ).labels()
        build = made.gauge("build_info", "1 for the version that runs.", "version", "python")
        build.labels(_own_version(), platform.python_version()).value = 1.0
        self.registry.register(made)

    def served(self, alias: str, variant: str, precision: str) -> Served:
        """What is fed when a variant answers for an alias; the same object each time."""
        return self._served.get((alias, variant, precision)) or self._made(alias, variant, precision)

    def outcome(self, served: tuple[str, str, str], endpoint: str, code: str, reason: str) -> Counter:
        """The count of requests that ended like this; `served` is alias, variant and precision."""
        return self.requests.labels(*served, endpoint, code, reason)

    def rejected(self, alias: str, reason: str) -> None:
        """Count a request that was turned away; an alias that nobody configured must come as UNKNOWN."""
        self.rejections.labels(alias, reason if reason in REJECTIONS else "other").inc()

    def _made(self, *served: str) -> Served:
        alias, variant, precision = served
        made = Served(
            *(self.first_token_seconds.labels(*served), self.inter_token_seconds.labels(*served)),
            self.request_seconds.labels(*served),
            *(self.tokens.labels(*served, kind) for kind in ("prompt", "completion", "reasoning")),
        )
        key = (alias, variant, precision)
        return self._served.setdefault(key, made) if len(self._served) < MAX_HISTOGRAMS else made


def _own_version() -> str:
    try:
        return version("quantgate")
    except PackageNotFoundError:  # run from a checkout
        return "unknown"
