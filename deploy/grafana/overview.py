"""What clients get: traffic, latency, errors, and the precision and quality that answer."""

from grafana_foundation_sdk.builders.dashboard import Dashboard, Row

from deploy.grafana.panels import (
    COUNT,
    GREEN,
    ORANGE,
    RATIO,
    RED,
    REQUESTS,
    SECONDS,
    TOKENS_PER_SECOND,
    US_DOLLARS,
    YELLOW,
    Target,
    graph,
    number,
    target,
)
from deploy.grafana.panels import dashboard as empty_dashboard
from deploy.grafana.queries import Queries, ratio, share
from gateway.observability.metrics import table
from gateway.observability.metrics.spec import MetricSpec

QUERIES = Queries(("alias",))
OUTPUT = ['kind="completion"']
READY = ['state="ready"']


def dashboard() -> Dashboard:
    """Build the dashboard."""
    made = empty_dashboard("overview", "Overview", "Traffic, latency, errors and quality of all aliases.", ["alias"])
    for add in (_now, _traffic, _latency, _errors, _quality, _keys, _external):
        made = add(made)
    return made


def _now(made: Dashboard) -> Dashboard:
    query = QUERIES
    success = f"1 - {ratio(query.errors(), query.rate(table.REQUESTS))}"
    spilled = ratio(query.rate(table.SPILLS), query.rate(table.REQUESTS))
    ready = query.largest(table.REPLICA_STATE, "replica", where=READY)
    missing = query.largest(table.REPLICA_METRIC_MISSING, "replica", "metric")
    loss, wait = (GREEN, YELLOW, RED), query.quantile(0.95, table.TIME_TO_FIRST_TOKEN_SECONDS)
    panels = (
        number("Requests", "Requests completed per second.", REQUESTS, target(query.rate(table.REQUESTS))),
        number(
            *("Success", "Requests that neither failed nor found no free replica in time.", RATIO, target(success)),
            *zip((None, 0.99, 0.995), reversed(loss), strict=True),
        ),
        number(
            *("First token, p95", "Time to the first token of streams, queue included.", SECONDS, target(wait)),
            *zip((None, 1.0, 2.5), loss, strict=True),
        ),
        number(
            *("Output", "Tokens generated per second.", TOKENS_PER_SECOND),
            target(query.rate(table.TOKENS, where=OUTPUT)),
        ),
        number(
            "Quality served",
            "Mean top-1 agreement with the parent of what answers, weighted by tokens. Unknown quality is left out.",
            RATIO,
            target(query.served_quality("top1_agreement")),
            *zip((None, 0.9, 0.95), reversed(loss), strict=True),
        ),
        number(
            *("Spilled", "Share of requests answered by a lower rung because of load.", RATIO, target(spilled)),
            *((None, GREEN), (0.05, YELLOW), (0.25, ORANGE)),
        ),
        number(
            *("Ready replicas", "Replicas that may get requests.", COUNT, target(f"sum({ready})")),
            *((None, RED), (1, GREEN)),
        ),
        number(
            "Metrics missing",
            "Metrics that routing reads and that an engine does not report, as after a rename in vLLM. Must be 0.",
            COUNT,
            target(f"sum({missing})"),
            *((None, GREEN), (1, RED)),
        ),
    )
    for panel in panels:
        made = made.with_panel(panel)
    return made


def _traffic(made: Dashboard) -> Dashboard:
    query = QUERIES
    requests = query.rate(table.REQUESTS, "alias")
    output = query.rate(table.TOKENS, "precision", where=OUTPUT)
    reason = query.rate(table.REQUESTS, "reason", where=['reason!="none"'])
    return (
        made.with_row(Row("Traffic"))
        .with_panel(
            graph("Requests by alias", "Requests completed per second.", REQUESTS, target(requests, "{{alias}}"))
        )
        .with_panel(
            graph(
                "Output tokens by precision",
                "Which precision generates the answers; under load, lower rungs take a part.",
                TOKENS_PER_SECOND,
                target(output, "{{precision}}"),
                stack="normal",
            )
        )
        .with_panel(
            graph(
                "Why this variant answered",
                "preferred: the best rung; spill: a better one was overloaded; floor: better ones miss the floor; "
                "pinned: asked by name; canary: a rollout; fallback: a better one had no replica.",
                RATIO,
                target(share(reason, query.rate(table.REQUESTS, where=['reason!="none"'])), "{{reason}}"),
                stack="normal",
                most=1,
            )
        )
    )


def _latency(made: Dashboard) -> Dashboard:
    query = QUERIES
    first, between, whole = table.TIME_TO_FIRST_TOKEN_SECONDS, table.INTER_TOKEN_LATENCY_SECONDS, table.REQUEST_SECONDS
    limited = "Of streams, queue included. The line is the limit of the objective."
    made = (
        made.with_row(Row("Latency"))
        .with_panel(graph("Time to first token", limited, SECONDS, *_percentiles(first), limit=2.5))
        .with_panel(
            graph("Time between tokens", "Between consecutive events with tokens.", SECONDS, *_percentiles(between))
        )
        .with_panel(graph("Whole request", "From arrival to the last byte.", SECONDS, *_percentiles(whole)))
    )
    wait = query.quantile(0.95, table.QUEUE_SECONDS, "alias")
    return made.with_panel(
        graph(
            *("Wait for a replica, p95", "Time that requests waited before they were sent.", SECONDS),
            target(wait, "{{alias}}"),
            width=12,
        )
    ).with_panel(
        graph(
            *("Requests waiting", "Requests in the queue of the gateway.", COUNT),
            target(query.total(table.WAITING, "alias"), "{{alias}}"),
            width=12,
        )
    )


def _percentiles(spec: MetricSpec) -> list[Target]:
    return [target(QUERIES.quantile(share, spec), f"p{share * 100:.0f}") for share in (0.5, 0.95, 0.99)]


def _errors(made: Dashboard) -> Dashboard:
    query = QUERIES
    codes = query.rate(table.REQUESTS, "code", where=['code!="200"'])
    rejections = query.rate(table.REJECTIONS, "reason")
    return (
        made.with_row(Row("Errors and rejections"))
        .with_panel(
            graph(
                "Errors by code",
                "HTTP status, 499 if the client left, or an error code of a stream that broke off.",
                REQUESTS,
                target(codes, "{{code}}"),
                width=6,
                stack="normal",
            )
        )
        .with_panel(
            graph(
                "Rejections by reason",
                "Requests that no replica saw.",
                REQUESTS,
                target(rejections, "{{reason}}"),
                width=6,
            )
        )
        .with_panel(
            graph(
                "Floor rejections",
                "Requests that demanded more quality than any variant with a replica has.",
                REQUESTS,
                target(query.rate(table.FLOOR_REJECTIONS, "alias"), "{{alias}}"),
                width=6,
            )
        )
        .with_panel(
            graph(
                "Spills by answering variant",
                "Requests that a lower rung answered because a better one was overloaded.",
                REQUESTS,
                target(query.rate(table.SPILLS, "alias", "variant"), "{{alias}} to {{variant}}"),
                width=6,
                stack="normal",
            )
        )
    )


def _quality(made: Dashboard) -> Dashboard:
    query = QUERIES
    precision = query.rate(table.TOKENS, "precision", where=OUTPUT)
    prompts = query.rate(table.TOKENS, "alias", where=['kind="prompt"'])
    spilling = query.largest(table.LADDER_SPILLING, "alias", "variant")
    return (
        made.with_row(Row("Quality"))
        .with_panel(
            graph(
                "Quality served",
                "Mean top-1 agreement with the parent, weighted by output tokens.",
                RATIO,
                target(query.served_quality("top1_agreement", "alias"), "{{alias}}"),
                width=6,
                most=1,
                soft_least=0.95,
            )
        )
        .with_panel(
            graph(
                "Share of precisions",
                "Of output tokens.",
                RATIO,
                target(share(precision, query.rate(table.TOKENS, where=OUTPUT)), "{{precision}}"),
                width=6,
                stack="normal",
                most=1,
            )
        )
        .with_panel(
            graph(
                "Rungs that spill",
                "1 while a rung sends conversations to the next lower one.",
                COUNT,
                target(spilling, "{{alias}} from {{variant}}"),
                width=6,
                most=1,
            )
        )
        .with_panel(
            graph(
                "Prompt tokens by alias",
                "Long prompts delay first tokens.",
                TOKENS_PER_SECOND,
                target(prompts, "{{alias}}"),
                width=6,
            )
        )
    )


def _keys(made: Dashboard) -> Dashboard:
    query = QUERIES
    tokens = target(query.rate(table.KEY_TOKENS, "key", "kind"), "{{key}} {{kind}}")
    row = Row("API keys (gateway.per_key_metrics)").collapsed(True)
    row = row.with_panel(
        graph(
            *("Requests by key", "Requests completed per second.", REQUESTS),
            target(query.rate(table.KEY_REQUESTS, "key"), "{{key}}"),
            width=12,
        )
    )
    return made.with_row(
        row.with_panel(graph("Tokens by key", "Tokens per second, by kind.", TOKENS_PER_SECOND, tokens, width=12))
    )


def _external(made: Dashboard) -> Dashboard:
    query = QUERIES
    cost = query.increase(table.EXTERNAL_COST_USD, "alias", "variant", over="1h")
    spent, budget = (query.total(spec, "variant") for spec in (table.EXTERNAL_SPENT_USD, table.EXTERNAL_BUDGET_USD))
    row = Row("External models").collapsed(True)
    row = row.with_panel(
        graph(
            *("Cost per hour", "Of answers of external models, over the hour before.", US_DOLLARS),
            target(cost, "{{alias}} {{variant}}"),
            width=12,
            stack="normal",
        )
    )
    return made.with_row(
        row.with_panel(
            graph(
                "Budget spent today",
                "Share of the budget of a day (UTC). At 100 % the model gets no more requests until midnight.",
                RATIO,
                target(ratio(spent, budget), "{{variant}}"),
                width=12,
                limit=1,
            )
        )
    )
