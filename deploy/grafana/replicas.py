"""Replicas: state, load, and what routing knows about them."""

from collections.abc import Mapping
from types import MappingProxyType

from grafana_foundation_sdk.builders.dashboard import Dashboard, Row

from deploy.grafana.panels import (
    BLUE,
    COUNT,
    GREEN,
    GREY,
    ORANGE,
    PER_SECOND,
    RATIO,
    RED,
    SECONDS,
    TOKENS_PER_SECOND,
    YELLOW,
    graph,
    number,
    row_target,
    rows,
    target,
    timeline,
)
from deploy.grafana.panels import dashboard as empty_dashboard
from deploy.grafana.queries import Queries, engine, ratio
from gateway.observability.metrics import table
from gateway.observability.metrics.fleet import BREAKER_STATES, SILENCE_STATES
from serving.replica import State

QUERIES = Queries(("variant", "replica"))
STATE_COLORS: Mapping[str, str] = MappingProxyType(
    {
        State.STOPPED: GREY,
        State.STARTING: BLUE,
        State.WARMING: "light-blue",
        State.READY: GREEN,
        State.DRAINING: YELLOW,
        State.STOPPING: ORANGE,
        State.FAILED: RED,
    }
)


def dashboard() -> Dashboard:
    """Build the dashboard."""
    description = "State of the replicas, their load, and what routing knows about them."
    made = empty_dashboard("replicas", "Replicas", description, ["variant", "replica"])
    for add in (_now, _states, _load, _polls, _discovery, _engine):
        made = add(made)
    return made


def _now(made: Dashboard) -> Dashboard:
    query = QUERIES
    ready = query.largest(table.REPLICA_STATE, "replica", where=['state="ready"'])
    breaker = query.largest(table.REPLICA_BREAKER, "replica", where=['state="open"'])
    silent = query.largest(table.REPLICA_SILENCE, "replica", where=['state!="responsive"'])
    unknown = query.largest(table.REPLICA_LOAD_UNKNOWN, "replica")
    missing = query.largest(table.REPLICA_METRIC_MISSING, "replica", "metric")
    good_at_0 = ((None, GREEN), (1, RED))
    return (
        made.with_panel(
            number(
                *("Ready", "Replicas that may get requests.", COUNT, target(f"sum({ready})"), (None, RED), (1, GREEN)),
                width=4,
            )
        )
        .with_panel(
            number(
                *("Not ready", "Replicas in any other state.", COUNT, target(f"count({ready}) - sum({ready})")),
                *((None, GREEN), (1, ORANGE)),
                width=4,
            )
        )
        .with_panel(
            number(
                "Breakers open",
                "Replicas without requests, because theirs failed.",
                COUNT,
                target(f"sum({breaker})"),
                *good_at_0,
                width=4,
            )
        )
        .with_panel(
            number(
                "Silent or hung",
                "Replicas that answer no polls and send no bytes.",
                COUNT,
                target(f"sum({silent})"),
                *good_at_0,
                width=4,
            )
        )
        .with_panel(
            number(
                "Load unknown",
                "Replicas without a recent poll: routing assumes a load.",
                COUNT,
                target(f"sum({unknown})"),
                *good_at_0,
                width=4,
            )
        )
        .with_panel(
            number(
                "Metrics missing",
                "Metrics that routing reads and that an engine does not report, as after a rename in vLLM.",
                COUNT,
                target(f"sum({missing})"),
                *good_at_0,
                width=4,
            )
        )
    )


def _states(made: Dashboard) -> Dashboard:
    query = QUERIES
    state = query.state(table.REPLICA_STATE, tuple(STATE_COLORS), "replica")
    breaker = query.state(table.REPLICA_BREAKER, BREAKER_STATES, "replica")
    silence = query.state(table.REPLICA_SILENCE, SILENCE_STATES, "replica")
    columns = {
        "in this state": (SECONDS, query.largest(table.REPLICA_STATE_SECONDS, "replica", "variant", "precision")),
        "in flight": (COUNT, query.total(table.REPLICA_IN_FLIGHT, "replica")),
        "slots": (COUNT, query.largest(table.REPLICA_SLOTS, "replica")),
        "estimated wait": (SECONDS, query.largest(table.REPLICA_WAIT_SECONDS, "replica")),
        "KV cache": (RATIO, query.largest(table.REPLICA_KV_USAGE_RATIO, "replica")),
    }
    return (
        made.with_row(Row("State"))
        .with_panel(timeline("State", "Only ready replicas get requests.", target(state, "{{replica}}"), STATE_COLORS))
        .with_panel(
            timeline(
                "Circuit breakers",
                "open: no requests, because those before failed; half_open: one to try.",
                target(breaker, "{{replica}}"),
                dict(zip(BREAKER_STATES, (GREEN, YELLOW, RED), strict=True)),
                width=12,
                height=6,
            )
        )
        .with_panel(
            timeline(
                "Answers polls and sends bytes",
                "A silent replica gets no new requests; a hung one loses those that it has.",
                target(silence, "{{replica}}"),
                dict(zip(SILENCE_STATES, (GREEN, YELLOW, RED), strict=True)),
                width=12,
                height=6,
            )
        )
        .with_panel(
            rows(
                "Replicas now",
                "What routing compares. Slots are the requests that an engine processes at once.",
                "replica",
                {name: (unit, row_target(expression)) for name, (unit, expression) in columns.items()},
            )
        )
    )


def _load(made: Dashboard) -> Dashboard:
    query = QUERIES
    in_engine = query.largest(table.REPLICA_ENGINE_REQUESTS, "replica", "state")
    against = ratio(f"sum by (replica) ({in_engine})", query.largest(table.REPLICA_SLOTS, "replica"))
    return (
        made.with_row(Row("Load"))
        .with_panel(
            graph(
                "Load against capacity",
                "Requests in the engine by the slots that it has: above 100 % they wait in the engine.",
                RATIO,
                target(against, "{{replica}}"),
                limit=1,
            )
        )
        .with_panel(
            graph(
                "Estimated wait",
                "What one more request would wait for others; a rung spills by it.",
                SECONDS,
                target(query.largest(table.REPLICA_WAIT_SECONDS, "replica"), "{{replica}}"),
            )
        )
        .with_panel(
            graph(
                "KV cache in use",
                "From about 85 % on, vLLM lets requests wait for room or preempts them.",
                RATIO,
                target(query.largest(table.REPLICA_KV_USAGE_RATIO, "replica"), "{{replica}}"),
                limit=0.85,
                most=1,
            )
        )
        .with_panel(
            graph(
                "Requests in the engine",
                "At the last poll, from all senders, by state.",
                COUNT,
                target(in_engine, "{{replica}} {{state}}"),
                width=12,
            )
        )
        .with_panel(
            graph(
                "In flight from this gateway",
                "Exact, summed over the workers.",
                COUNT,
                target(query.total(table.REPLICA_IN_FLIGHT, "replica"), "{{replica}}"),
                width=12,
            )
        )
    )


def _polls(made: Dashboard) -> Dashboard:
    query = QUERIES
    failed = query.rate(table.REPLICA_POLLS, "replica", "outcome", where=['outcome!="ok"'])
    none = query.rate(table.REPLICA_POLLS, "replica")
    age = query.largest(table.REPLICA_POLL_AGE_SECONDS, "replica")
    return (
        made.with_row(Row("Polls"))
        .with_panel(
            graph(
                "Age of the last poll",
                "Since a poll last reported the load of the engine.",
                SECONDS,
                target(age, "{{replica}}"),
                width=12,
            )
        )
        .with_panel(
            graph(
                "Polls of engines that failed",
                "failed: no answer; missing: a metric was absent or invalid.",
                PER_SECOND,
                target(f"{failed} or 0 * {none}", "{{replica}} {{outcome}}"),
                width=12,
            )
        )
    )


def _discovery(made: Dashboard) -> Dashboard:
    query = QUERIES
    connected = query.largest(table.DISCOVERY_CONNECTED, "variant")
    pods = query.largest(table.DISCOVERY_PODS, "variant", "state")
    events, lists = query.rate(table.DISCOVERY_EVENTS, "type"), query.rate(table.DISCOVERY_LISTS)
    errors = query.rate(table.DISCOVERY_ERRORS, "variant", "reason")
    return (
        made.with_row(Row("Discovery in Kubernetes"))
        .with_panel(
            graph(
                "Pods in EndpointSlices",
                "As Kubernetes sees them; a pod that is ready there is verified before it is a ready replica.",
                COUNT,
                target(pods, "{{variant}} {{state}}"),
                width=12,
            )
        )
        .with_panel(
            graph(
                "Lists and watches that failed",
                "Meanwhile the pods stay as they were last seen; expired is usual, and is followed by a list.",
                PER_SECOND,
                target(errors, "{{variant}} {{reason}}"),
                width=12,
            )
        )
        .with_panel(
            graph(
                "API server is read",
                "1: the EndpointSlices of a variant are watched; 0: they can't be read.",
                COUNT,
                target(connected, "{{variant}}"),
                most=1,
                width=12,
            )
        )
        .with_panel(
            graph(
                "Events and lists",
                "Changes of EndpointSlices, bookmarks, and complete lists.",
                PER_SECOND,
                target(events, "{{type}}"),
                target(lists, "list"),
                width=12,
            )
        )
    )


def _engine(made: Dashboard) -> Dashboard:
    hits, queries = (
        engine(f"vllm:prefix_cache_{kind}_total", "sum", "instance", rate=True) for kind in ("hits", "queries")
    )
    panels = (
        graph(
            "Tokens of the engines",
            "As vLLM counts them, from all senders.",
            TOKENS_PER_SECOND,
            target(engine("vllm:generation_tokens_total", "sum", "model_name", rate=True), "{{model_name}} output"),
            target(engine("vllm:prompt_tokens_total", "sum", "model_name", rate=True), "{{model_name}} prompt"),
        ),
        graph(
            "Prefix cache hits",
            "Share of prompt tokens found in the prefix cache.",
            RATIO,
            target(ratio(hits, queries), "{{instance}}"),
            most=1,
        ),
        graph(
            "Preemptions",
            "Requests that lost their KV cache to others and start again: a sign of too small a cache.",
            PER_SECOND,
            target(engine("vllm:num_preemptions_total", "sum", "instance", rate=True), "{{instance}}"),
        ),
        graph(
            "Requests by engine",
            "Running and waiting, as vLLM reports them.",
            COUNT,
            target(engine("vllm:num_requests_running", "sum", "instance"), "{{instance}} running"),
            target(engine("vllm:num_requests_waiting", "sum", "instance"), "{{instance}} waiting"),
        ),
        graph(
            "KV cache of the engines",
            "As vLLM reports it.",
            RATIO,
            target(engine("vllm:kv_cache_usage_perc", "max", "instance"), "{{instance}}"),
            most=1,
        ),
        graph(
            "Answers by finish reason",
            "As vLLM counts them.",
            PER_SECOND,
            target(engine("vllm:request_success_total", "sum", "finished_reason", rate=True), "{{finished_reason}}"),
            stack="normal",
        ),
    )
    row = Row("Engine: vLLM's own metrics, if Prometheus scrapes the replicas").collapsed(True)
    for panel in panels:
        row = row.with_panel(panel)
    return made.with_row(row)
