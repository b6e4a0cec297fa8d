"""Every metric that the gateway exposes on `/metrics` of the admin port, by topic.

Label values come from the configuration or from fixed sets in the code, never from a client: the number of series is
bounded. Counters of configured aliases exist at 0 from the start (gateway/proxy/initial_series.py), because `increase`
and `rate` do not see the first step of a series that appears with it. Labels that several metrics share:

alias       a configured alias, a variant's name or ALIAS@VARIANT where the request named that, or `_unknown`
variant     a configured variant, or `none` if no replica was chosen
precision   bf16, fp16, int8, int4, ..., external of the variant, or `none`
replica     id of a replica: VARIANT-N, VARIANT-url-N for one that is configured by its URL, the name of a pod,
            or VARIANT-external
endpoint    chat.completions, completions, embeddings, responses, ... (names in gateway/openai/endpoints.py)
"""

from collections.abc import Mapping
from types import MappingProxyType

from gateway.observability.metrics.spec import MetricSpec

# Buckets of vLLM 0.32 (vllm/v1/metrics/buckets.py): panels of the engine and of the gateway line up.
FIRST_TOKEN_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560),
)
INTER_TOKEN_BUCKETS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80),
)
REQUEST_BUCKETS = (*(0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680),)
# Finer at the low end: the gateway's own overhead is a fraction of a millisecond.
OVERHEAD_BUCKETS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)

_SERVED = ("alias", "variant", "precision")

# How to aggregate a gauge over the workers of one gateway (`--workers`); each worker is scraped by itself.
_SUM = " Sum it over workers."
_MAX = " Take the maximum over workers."

# Requests

# code: the HTTP status, 499 if the client disconnected, or an error code if a stream failed after its status was sent.
# reason: why this variant was chosen: preferred, spill, floor, pinned, canary, fallback, or none.
REQUESTS = MetricSpec(
    "quantgate_requests_total",
    "counter",
    (*_SERVED, "endpoint", "code", "reason"),
    "Total number of requests completed, by result code and by the reason for the choice of the variant.",
)
REQUESTS_IN_FLIGHT = MetricSpec(
    "quantgate_requests_in_flight",
    "gauge",
    ("endpoint",),
    "Current number of requests being processed, queued requests included." + _SUM,
)
TOKENS = MetricSpec(
    "quantgate_tokens_total",
    "counter",
    (*_SERVED, "kind"),
    "Total number of tokens processed, by kind: prompt, completion, reasoning (also counted as completion).",
)
REQUEST_SECONDS = MetricSpec(
    "quantgate_request_seconds",
    "histogram",
    _SERVED,
    "Time from the arrival of a request to the last byte of its response, if a replica was chosen for it.",
    REQUEST_BUCKETS,
)
TIME_TO_FIRST_TOKEN_SECONDS = MetricSpec(
    "quantgate_time_to_first_token_seconds",
    "histogram",
    _SERVED,
    "Time from the arrival of a streaming request to its first token.",
    FIRST_TOKEN_BUCKETS,
)
INTER_TOKEN_LATENCY_SECONDS = MetricSpec(
    "quantgate_inter_token_latency_seconds",
    "histogram",
    _SERVED,
    "Time between consecutive streamed events that carry tokens.",
    INTER_TOKEN_BUCKETS,
)
OVERHEAD_SECONDS = MetricSpec(
    "quantgate_overhead_seconds",
    "histogram",
    (),
    "Time that the gateway spent on a request before sending it to its first replica, queueing excluded.",
    OVERHEAD_BUCKETS,
)

# Queueing and rejection

QUEUE_SECONDS = MetricSpec(
    "quantgate_queue_seconds",
    "histogram",
    ("alias",),
    "Time that a request waited for a replica, requests that gave up waiting included.",
    FIRST_TOKEN_BUCKETS,
)
WAITING = MetricSpec(
    "quantgate_waiting", "gauge", ("alias",), "Current number of requests waiting for a replica." + _SUM
)
# reason: rate_limit, queue_full, queue_timeout, draining, too_large, too_slow, not_allowed, invalid_key,
# keys_unavailable, invalid_request, unknown_model, floor, no_replica, other.
REJECTIONS = MetricSpec(
    "quantgate_rejections_total",
    "counter",
    ("alias", "reason"),
    "Total number of requests rejected before a replica was chosen, by reason.",
)
FLOOR_REJECTIONS = MetricSpec(
    "quantgate_floor_rejections_total",
    "counter",
    ("alias",),
    "Total number of requests rejected because no variant that meets the quality floor could answer.",
)

# Ladder: the choice among the variants of an alias

SPILLS = MetricSpec(
    "quantgate_spills_total",
    "counter",
    ("alias", "variant"),
    "Total number of requests answered by a lower rung because a better rung was overloaded, by answering variant.",
)
LADDER_SPILLING = MetricSpec(
    "quantgate_ladder_spilling",
    "gauge",
    ("alias", "variant"),
    "Whether a rung spills requests to the next lower rung (1) or not (0)." + _MAX,
)
LADDER_SWITCHES = MetricSpec(
    "quantgate_ladder_switches_total",
    "counter",
    ("alias", "variant", "to"),
    "Total number of times that a rung started (to: spill) or stopped (to: return) spilling.",
)
SESSION_MOVES = MetricSpec(
    "quantgate_session_moves_total",
    "counter",
    ("alias", "direction"),
    "Total number of times that a conversation moved to the variant of another rung, by direction: up or down.",
)

# Retries

# code: the error code of the failed attempt.
RETRIES = MetricSpec(
    "quantgate_retries_total",
    "counter",
    ("alias", "code"),
    "Total number of attempts after a request's first one, by error code of the failed attempt.",
)
# reason: poison (two replicas disconnected during it), attempts (three were made), budget (gateway.retries is used up).
RETRIES_REFUSED = MetricSpec(
    "quantgate_retries_refused_total",
    "counter",
    ("alias", "reason"),
    "Total number of failed requests that were not retried, by reason: poison, attempts, budget.",
)
CLIENT_RETRIES = MetricSpec(
    "quantgate_client_retries_total",
    "counter",
    (),
    "Total number of requests that a client's SDK marked as retries (x-stainless-retry-count).",
)

# Replicas

# state: stopped, starting, warming, ready, draining, stopping, failed.
REPLICA_STATE = MetricSpec(
    "quantgate_replica_state",
    "gauge",
    ("replica", "variant", "precision", "state"),
    "State of a replica: 1 for the current state, 0 for all others." + _MAX,
)
REPLICA_STATE_SECONDS = MetricSpec(
    "quantgate_replica_state_seconds",
    "gauge",
    ("replica", "variant", "precision"),
    "Time since a replica entered its current state." + _MAX,
)
REPLICA_IN_FLIGHT = MetricSpec(
    "quantgate_replica_in_flight",
    "gauge",
    ("replica", "variant", "precision"),
    "Current number of requests that this gateway has in flight on a replica." + _SUM,
)
# state: closed, half_open, open.
REPLICA_BREAKER = MetricSpec(
    "quantgate_replica_breaker",
    "gauge",
    ("replica", "variant", "state"),
    "State of a replica's circuit breaker: 1 for the current state, 0 for all others." + _MAX,
)
# state: responsive, silent, hung.
REPLICA_SILENCE = MetricSpec(
    "quantgate_replica_silence",
    "gauge",
    ("replica", "variant", "state"),
    "Whether a replica answers polls and sends bytes: 1 for the current state, 0 for all others. A silent replica gets "
    "no new requests, a hung one loses those that it has." + _MAX,
)
REPLICA_WAIT_SECONDS = MetricSpec(
    "quantgate_replica_wait_seconds",
    "gauge",
    ("replica", "variant"),
    "Estimated time that one more request would wait on a replica; absent while its speed is unknown." + _MAX,
)
REPLICA_LOAD_UNKNOWN = MetricSpec(
    "quantgate_replica_load_unknown",
    "gauge",
    ("replica", "variant"),
    "Whether a replica's load from other senders is unknown (1), as no recent poll reported it, or known (0)." + _MAX,
)
REPLICA_SLOTS = MetricSpec(
    "quantgate_replica_slots",
    "gauge",
    ("replica", "variant"),
    "Number of requests that a replica processes at once without more of them waiting; absent while unknown." + _MAX,
)

# Polls of the replicas' engines

# outcome: ok, missing (a metric was absent or invalid), failed.
REPLICA_POLLS = MetricSpec(
    "quantgate_replica_polls_total",
    "counter",
    ("replica", "variant", "outcome"),
    "Total number of polls of a replica's engine metrics, by outcome: ok, missing, failed.",
)
REPLICA_POLL_AGE_SECONDS = MetricSpec(
    "quantgate_replica_poll_age_seconds",
    "gauge",
    ("replica", "variant"),
    "Time since the start of the last poll that reported a replica's load." + _MAX,
)
REPLICA_METRIC_MISSING = MetricSpec(
    "quantgate_replica_metric_missing",
    "gauge",
    ("replica", "variant", "metric"),
    "Whether an expected metric is missing from a replica's engine (1), as after a rename in vLLM, or present (0)."
    + _MAX,
)
# state: running, waiting.
REPLICA_ENGINE_REQUESTS = MetricSpec(
    "quantgate_replica_engine_requests",
    "gauge",
    ("replica", "variant", "state"),
    "Number of requests in a replica's engine at the last poll, from all senders, by state: running, waiting." + _MAX,
)
REPLICA_KV_USAGE_RATIO = MetricSpec(
    "quantgate_replica_kv_usage_ratio",
    "gauge",
    ("replica", "variant"),
    "Fraction of a replica's KV cache in use at the last poll (0 to 1)." + _MAX,
)

# Discovery in Kubernetes

DISCOVERY_CONNECTED = MetricSpec(
    "quantgate_discovery_connected",
    "gauge",
    ("variant",),
    "Whether the EndpointSlices of a variant can be read (1), or its pods stay as they were last seen (0)." + _MAX,
)
# state: ready, terminating, not_ready, unlisted (in no EndpointSlice after an empty list, but it answers).
DISCOVERY_PODS = MetricSpec(
    "quantgate_discovery_pods",
    "gauge",
    ("variant", "state"),
    "Number of pods of a variant in its EndpointSlices, by state: ready, terminating, not_ready; unlisted: an empty "
    "list lacks them, but they answer." + _MAX,
)
# type: added, modified, deleted, bookmark.
DISCOVERY_EVENTS = MetricSpec(
    "quantgate_discovery_events_total",
    "counter",
    ("variant", "type"),
    "Total number of events of EndpointSlices, by type: added, modified, deleted, bookmark.",
)
DISCOVERY_LISTS = MetricSpec(
    "quantgate_discovery_lists_total",
    "counter",
    ("variant",),
    "Total number of complete lists of EndpointSlices: one at the start, and one whenever the history was too old.",
)
# reason: away, unauthorized, forbidden, not_found, rejected, expired, throttled.
DISCOVERY_ERRORS = MetricSpec(
    "quantgate_discovery_errors_total",
    "counter",
    ("variant", "reason"),
    "Total number of lists and watches that failed, by reason: away, unauthorized, forbidden, not_found, rejected, "
    "expired, throttled.",
)

# Variants

# measure: kl_mean, top1_agreement, perplexity_ratio, kl_p99, length_ratio. source: measured, declared, parent.
VARIANT_QUALITY = MetricSpec(
    "quantgate_variant_quality",
    "gauge",
    ("variant", "precision", "measure", "source"),
    "Quality of a variant relative to its parent model, by measure." + _MAX,
)
VARIANT_QUALITY_BOUND = MetricSpec(
    "quantgate_variant_quality_bound",
    "gauge",
    ("variant", "precision", "measure", "source"),
    "Worse end of the 95 % interval of a variant's quality, which floors are held against." + _MAX,
)
VARIANT_SIZE_BYTES = MetricSpec(
    "quantgate_variant_size_bytes",
    "gauge",
    ("variant", "precision"),
    "Total size of a variant's files, from its manifest; absent without one." + _MAX,
)
VARIANT_THROUGHPUT = MetricSpec(
    "quantgate_variant_measured_output_tokens_per_second",
    "gauge",
    ("variant",),
    "Output tokens per second of one replica at full load, from capacity.json; absent if it was not measured." + _MAX,
)

# External models

EXTERNAL_COST_USD = MetricSpec(
    "quantgate_external_cost_usd_total",
    "counter",
    ("alias", "variant"),
    "Total cost of answers of external models in US dollars, by configured price or litellm's table.",
)
EXTERNAL_BUDGET_USD = MetricSpec(
    "quantgate_external_budget_usd",
    "gauge",
    ("variant",),
    "Budget of an external model per day (UTC) in US dollars, of this process." + _SUM,
)
EXTERNAL_SPENT_USD = MetricSpec(
    "quantgate_external_spent_usd",
    "gauge",
    ("variant",),
    "Cost of an external model today (UTC) in US dollars, as its budget counts it." + _SUM,
)

# Client connections

HEARTBEATS = MetricSpec(
    "quantgate_heartbeats_total",
    "counter",
    (),
    "Total number of heartbeats sent to keep idle streams open: SSE comments, or events where the API has one.",
)
# reason: slow_reader.
CLIENTS_CUT = MetricSpec(
    "quantgate_clients_cut_total",
    "counter",
    ("reason",),
    "Total number of client connections that the gateway aborted, by reason.",
)

# state: active, idle.
CLIENT_CONNECTIONS = MetricSpec(
    "quantgate_client_connections",
    "gauge",
    ("state",),
    "Current number of open client connections, by state: active (a request is being answered), idle." + _SUM,
)
REQUEST_BODY_BYTES = MetricSpec(
    "quantgate_request_body_bytes",
    "gauge",
    (),
    "Memory that request bodies take now; gateway.memory_bytes limits it." + _SUM,
)
# file: as the configuration names it.
CERTIFICATE_EXPIRATION_SECONDS = MetricSpec(
    "quantgate_certificate_expiration_timestamp_seconds",
    "gauge",
    ("file",),
    "When the first certificate of a configured PEM file expires, in seconds since 1970." + _MAX,
)

# Rollouts

# The variant is the new one; there are no series while no rollout of the alias runs.
ROLLOUT_STEP = MetricSpec(
    "quantgate_rollout_step",
    "gauge",
    ("alias", "variant"),
    "Step that a rollout is in, counted from 1; 0 before the first conversation is drawn to the new variant." + _MAX,
)
ROLLOUT_WEIGHT = MetricSpec(
    "quantgate_rollout_weight",
    "gauge",
    ("alias", "variant"),
    "Share of new conversations that are drawn to the new variant (0 to 1), as this gateway uses it." + _MAX,
)
# gate: a name of gateway/rollout/gates.py.
ROLLOUT_GATE_LOG_EVIDENCE = MetricSpec(
    "quantgate_rollout_gate_log_evidence",
    "gauge",
    ("alias", "gate"),
    "Natural logarithm of the evidence (e-value) that a gate has against the new variant; only where the driver is."
    + _MAX,
)
# state: pass, fail, more.
ROLLOUT_GATE_STATE = MetricSpec(
    "quantgate_rollout_gate_state",
    "gauge",
    ("alias", "gate", "state"),
    "State of a gate: 1 for the current state, 0 for all others; only where the driver is." + _MAX,
)
ROLLOUT_CONVERSATIONS = MetricSpec(
    "quantgate_rollout_conversations_total",
    "counter",
    ("alias", "arm"),
    "Total number of conversations drawn while both arms of a rollout had a chance, by arm: stable, canary.",
)
# cause: preflight, starting, smoke, shadow, gate, deadline, operator.
ROLLOUT_ROLLBACKS = MetricSpec(
    "quantgate_rollout_rollbacks_total",
    "counter",
    ("alias", "cause"),
    "Total number of rollouts that this gateway has ended or sent back, by cause.",
)
ROLLOUT_STUCK = MetricSpec(
    "quantgate_rollout_stuck",
    "gauge",
    ("alias",),
    "Whether a rollout is paused, or holds because nothing but the new variant could answer (1), or goes on (0)."
    + _MAX,
)
STATE_DATABASE_UP = MetricSpec(
    "quantgate_state_database_up",
    "gauge",
    (),
    "Whether the state database can be read (1), or the last revision of each alias stays in force (0)." + _MAX,
)

# API keys, if gateway.per_key_metrics is set

# key: its name in the keys file. code: as in quantgate_requests_total.
KEY_REQUESTS = MetricSpec(
    "quantgate_key_requests_total",
    "counter",
    ("key", "code"),
    "Total number of requests completed, by name of the API key and result code; see gateway.per_key_metrics.",
)
KEY_TOKENS = MetricSpec(
    "quantgate_key_tokens_total",
    "counter",
    ("key", "kind"),
    "Total number of tokens processed, by name of the API key and kind: prompt, completion.",
)

# 0 where nothing is shared: with SQLite.
QUOTA_LOCAL = MetricSpec(
    "quantgate_quota_local",
    "gauge",
    (),
    "Whether this gateway admits a fixed share of the limits of API keys, because the state database through which it "
    "shares them is away (1), or not (0)." + _MAX,
)

# Usage

USAGE_PENDING_REQUESTS = MetricSpec(
    "quantgate_usage_pending_requests",
    "gauge",
    (),
    "Current number of requests whose usage is not in the state database yet; grows while that is away." + _SUM,
)
USAGE_LOST_REQUESTS = MetricSpec(
    "quantgate_usage_lost_requests_total",
    "counter",
    (),
    "Total number of requests missing in the usage, because the state database was away for too long.",
)

# Process

# outcome: applied, refused (invalid; nothing was changed), failed (applied in part).
CONFIG_RELOADS = MetricSpec(
    "quantgate_config_reloads_total",
    "counter",
    ("outcome",),
    "Total number of configuration reloads, by outcome: applied, refused, failed.",
)
ACCESS_LOG_LINES_DROPPED = MetricSpec(
    "quantgate_access_log_lines_dropped_total",
    "counter",
    (),
    "Total number of access log lines dropped because the log was not read in time or could not be written.",
)
EVENT_LOOP_LAG_SECONDS = MetricSpec(
    "quantgate_event_loop_lag_seconds",
    "histogram",
    (),
    "Delay with which the event loop ran a periodic task.",
    OVERHEAD_BUCKETS,
)
BUILD_INFO = MetricSpec(
    "quantgate_build_info",
    "gauge",
    ("version", "python"),
    "Version of quantgate and of Python; the value is always 1." + _MAX,
)

GROUPS: Mapping[str, tuple[MetricSpec, ...]] = MappingProxyType(
    {
        "Requests": (
            *(REQUESTS, REQUESTS_IN_FLIGHT, TOKENS, REQUEST_SECONDS),
            *(TIME_TO_FIRST_TOKEN_SECONDS, INTER_TOKEN_LATENCY_SECONDS, OVERHEAD_SECONDS),
        ),
        "Queueing and rejection": (QUEUE_SECONDS, WAITING, REJECTIONS, FLOOR_REJECTIONS),
        "Ladder": (SPILLS, LADDER_SPILLING, LADDER_SWITCHES, SESSION_MOVES),
        "Retries": (RETRIES, RETRIES_REFUSED, CLIENT_RETRIES),
        "Replicas": (
            *(REPLICA_STATE, REPLICA_STATE_SECONDS, REPLICA_IN_FLIGHT, REPLICA_BREAKER, REPLICA_SILENCE),
            *(REPLICA_WAIT_SECONDS, REPLICA_LOAD_UNKNOWN, REPLICA_SLOTS),
        ),
        "Polls of the replicas' engines": (
            *(REPLICA_POLLS, REPLICA_POLL_AGE_SECONDS, REPLICA_METRIC_MISSING),
            *(REPLICA_ENGINE_REQUESTS, REPLICA_KV_USAGE_RATIO),
        ),
        "Discovery in Kubernetes": (
            *(DISCOVERY_CONNECTED, DISCOVERY_PODS),
            *(DISCOVERY_EVENTS, DISCOVERY_LISTS, DISCOVERY_ERRORS),
        ),
        "Variants": (VARIANT_QUALITY, VARIANT_QUALITY_BOUND, VARIANT_SIZE_BYTES, VARIANT_THROUGHPUT),
        "External models": (EXTERNAL_COST_USD, EXTERNAL_BUDGET_USD, EXTERNAL_SPENT_USD),
        "Client connections": (
            *(HEARTBEATS, CLIENTS_CUT, CLIENT_CONNECTIONS),
            *(REQUEST_BODY_BYTES, CERTIFICATE_EXPIRATION_SECONDS),
        ),
        "Rollouts": (
            *(ROLLOUT_STEP, ROLLOUT_WEIGHT, ROLLOUT_GATE_LOG_EVIDENCE, ROLLOUT_GATE_STATE),
            *(ROLLOUT_CONVERSATIONS, ROLLOUT_ROLLBACKS, ROLLOUT_STUCK, STATE_DATABASE_UP),
        ),
        "API keys": (KEY_REQUESTS, KEY_TOKENS, QUOTA_LOCAL),
        "Usage": (USAGE_PENDING_REQUESTS, USAGE_LOST_REQUESTS),
        "Process": (CONFIG_RELOADS, ACCESS_LOG_LINES_DROPPED, EVENT_LOOP_LAG_SECONDS, BUILD_INFO),
    }
)
TABLE: tuple[MetricSpec, ...] = tuple(spec for group in GROUPS.values() for spec in group)
