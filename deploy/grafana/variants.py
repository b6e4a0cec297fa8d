"""Variants side by side: measured quality and size, and how they answer now."""

from grafana_foundation_sdk.builders.dashboard import Dashboard, Row

from deploy.grafana.panels import (
    BYTES,
    COUNT,
    GREEN,
    ORANGE,
    RATIO,
    RED,
    REQUESTS,
    SECONDS,
    TOKENS_PER_SECOND,
    bars,
    graph,
    row_target,
    rows,
    target,
)
from deploy.grafana.panels import dashboard as empty_dashboard
from deploy.grafana.queries import Queries, ratio
from gateway.observability.metrics import table

QUERIES = Queries(("variant",))
OUTPUT = ['kind="completion"']


def dashboard() -> Dashboard:
    """Build the dashboard."""
    description = "Variants side by side: measured quality, size and speed, and how they answer now."
    made = empty_dashboard("variants", "Variants", description, ["variant"])
    for add in (_quality, _speed, _answers):
        made = add(made)
    return made


def _measure(measure: str, *by: str) -> str:
    return QUERIES.largest(table.VARIANT_QUALITY, "variant", *by, where=[f'measure="{measure}"'])


def _quality(made: Dashboard) -> Dashboard:
    query = QUERIES
    bound = query.largest(table.VARIANT_QUALITY_BOUND, "variant", where=['measure="top1_agreement"'])
    columns = {
        "top-1 agreement": (RATIO, _measure("top1_agreement", "precision", "source")),
        "at least (95 %)": (RATIO, bound),
        "KL divergence": (COUNT, _measure("kl_mean")),
        "KL p99": (COUNT, _measure("kl_p99")),
        "perplexity ratio": (COUNT, _measure("perplexity_ratio")),
        "length ratio": (COUNT, _measure("length_ratio")),
        "size": (BYTES, query.largest(table.VARIANT_SIZE_BYTES, "variant")),
        "measured output": (TOKENS_PER_SECOND, query.largest(table.VARIANT_THROUGHPUT, "variant")),
    }
    return (
        made.with_row(Row("Measured before serving"))
        .with_panel(
            rows(
                "Variants",
                "Relative to the parent model, from the manifests. source: measured, declared in the configuration, or "
                "the parent itself. Output tokens per second are those of one replica at full load (capacity.json).",
                "variant",
                {name: (unit, row_target(expression)) for name, (unit, expression) in columns.items()},
            )
        )
        .with_panel(
            bars(
                "Top-1 agreement, at least",
                "Worse end of the 95 % interval: floors are held against it.",
                RATIO,
                target(bound, "{{variant}}"),
                *((None, RED), (0.9, ORANGE), (0.95, GREEN)),
            )
            .min(0.8)
            .max(1)
        )
        .with_panel(
            bars(
                "KL divergence",
                "Mean, in nats per token: 0 is the parent.",
                COUNT,
                target(_measure("kl_mean"), "{{variant}}"),
                *((None, GREEN), (0.02, ORANGE), (0.1, RED)),
            ).min(0)
        )
        .with_panel(
            bars(
                "Size of the files",
                "From the manifests; a parent model has none.",
                BYTES,
                target(query.largest(table.VARIANT_SIZE_BYTES, "variant"), "{{variant}}"),
            ).min(0)
        )
    )


def _speed(made: Dashboard) -> Dashboard:
    query = QUERIES
    output = query.rate(table.TOKENS, "variant", where=OUTPUT)
    ready = f"sum by (variant) ({query.largest(table.REPLICA_STATE, 'variant', 'replica', where=_READY)})"
    capacity = f"({query.largest(table.VARIANT_THROUGHPUT, 'variant')} * on (variant) {ready})"
    first, between = table.TIME_TO_FIRST_TOKEN_SECONDS, table.INTER_TOKEN_LATENCY_SECONDS
    return (
        made.with_row(Row("Speed"))
        .with_panel(
            graph(
                "Output tokens by variant",
                "Tokens generated per second.",
                TOKENS_PER_SECOND,
                target(output, "{{variant}}"),
                width=6,
            )
        )
        .with_panel(
            graph(
                "Output against measured capacity",
                "By what the ready replicas can generate at full load. Without a measurement there is no line.",
                RATIO,
                target(ratio(output, capacity), "{{variant}}"),
                width=6,
                limit=1,
            )
        )
        .with_panel(
            graph(
                "Time to first token, p95",
                "Of streams, queue included.",
                SECONDS,
                target(query.quantile(0.95, first, "variant"), "{{variant}}"),
                width=6,
            )
        )
        .with_panel(
            graph(
                "Time between tokens, median",
                "Of streams.",
                SECONDS,
                target(query.quantile(0.5, between, "variant"), "{{variant}}"),
                width=6,
            )
        )
    )


_READY = ['state="ready"']


def _answers(made: Dashboard) -> Dashboard:
    query = QUERIES
    answered = query.rate(table.REQUESTS, "variant", where=['code="200"'])
    output = query.rate(table.TOKENS, "variant", where=OUTPUT)
    reasoning = query.rate(table.TOKENS, "variant", where=['kind="reasoning"'])
    errors = query.rate(table.REQUESTS, "variant", where=['code=~"5..|[a-z].*"'])
    requests = query.rate(table.REQUESTS, "variant")
    return (
        made.with_row(Row("Answers"))
        .with_panel(
            graph(
                *("Requests by variant", "Requests completed per second.", REQUESTS, target(requests, "{{variant}}")),
                width=6,
                stack="normal",
            )
        )
        .with_panel(
            graph(
                "Errors by variant",
                "Share of its requests that failed.",
                RATIO,
                target(f"({ratio(errors, requests)}) or 0 * ({requests} > 0)", "{{variant}}"),
                width=6,
            )
        )
        .with_panel(
            graph(
                "Output tokens per answer",
                "Quantized reasoning models may think longer: compare with the length ratio above.",
                COUNT,
                target(ratio(output, answered), "{{variant}}"),
                width=6,
            )
        )
        .with_panel(
            graph(
                "Reasoning share",
                "Share of output tokens that are reasoning.",
                RATIO,
                target(ratio(reasoning, output), "{{variant}}"),
                width=6,
                most=1,
            )
        )
    )
