"""Rollouts: step, weight and gates, and both arms side by side."""

from grafana_foundation_sdk.builders.dashboard import Dashboard, Row

from deploy.grafana.panels import (
    COUNT,
    GREEN,
    GREY,
    ORANGE,
    RATIO,
    RED,
    REQUESTS,
    SECONDS,
    graph,
    number,
    target,
    timeline,
)
from deploy.grafana.panels import dashboard as empty_dashboard
from deploy.grafana.queries import ERROR_CODES, Queries, ratio
from gateway.observability.metrics import table

QUERIES = Queries(("alias",))
# -log(alpha) of the default plan: from here on, a gate has failed.
FAILED_LOG_EVIDENCE = 3.0
GATE_COLORS = {"pass": GREEN, "more": GREY, "fail": RED}


def dashboard() -> Dashboard:
    """Build the dashboard."""
    description = "The rollouts that run now: step, weight, gates, and both arms. Empty while none runs."
    made = empty_dashboard("rollouts", "Rollouts", description, ["alias"])
    for add in (_now, _progress, _gates, _arms):
        made = add(made)
    return made


def _now(made: Dashboard) -> Dashboard:
    query = QUERIES
    stuck = query.largest(table.ROLLOUT_STUCK, "alias")
    failed = query.largest(table.ROLLOUT_GATE_STATE, "alias", "gate", where=['state="fail"'])
    return (
        made.with_panel(
            number(
                "Step",
                "Counted from 1; 0 before the first conversation is drawn to the new variant.",
                COUNT,
                target(query.largest(table.ROLLOUT_STEP, "alias", "variant"), "{{alias}}: {{variant}}"),
                width=6,
            )
        )
        .with_panel(
            number(
                "Weight",
                "Share of new conversations that are drawn to the new variant.",
                RATIO,
                target(query.largest(table.ROLLOUT_WEIGHT, "alias", "variant"), "{{alias}}: {{variant}}"),
                width=6,
            )
        )
        .with_panel(
            number(
                "Paused or held",
                "Rollouts that do not go on by themselves.",
                COUNT,
                target(f"sum({stuck})"),
                *((None, GREEN), (1, ORANGE)),
                width=4,
            )
        )
        .with_panel(
            number(
                "Failed gates",
                "Gates that found the new variant worse.",
                COUNT,
                target(f"sum({failed})"),
                *((None, GREEN), (1, RED)),
                width=4,
            )
        )
        .with_panel(
            number(
                "Sent back",
                "Rollouts that ended with the old variant, in the time shown.",
                COUNT,
                target(query.increase(table.ROLLOUT_ROLLBACKS)),
                *((None, GREEN), (1, RED)),
                width=4,
            )
        )
    )


def _progress(made: Dashboard) -> Dashboard:
    query = QUERIES
    drawn = query.rate(table.ROLLOUT_CONVERSATIONS, "alias", "arm")
    return (
        made.with_row(Row("Progress"))
        .with_panel(
            graph(
                "Weight of the new variant",
                "Share of new conversations, as the gateways use it.",
                RATIO,
                target(query.largest(table.ROLLOUT_WEIGHT, "alias", "variant"), "{{alias}}: {{variant}}"),
                most=1,
            )
        )
        .with_panel(
            graph(
                "Conversations drawn",
                "By arm, while both had a chance.",
                REQUESTS,
                target(drawn, "{{alias}} {{arm}}"),
                stack="normal",
            )
        )
        .with_panel(
            graph(
                "Rollbacks",
                "By cause: the phase that failed, a gate, a deadline, or an operator.",
                COUNT,
                target(query.increase(table.ROLLOUT_ROLLBACKS, "alias", "cause", over="$__interval"), "{{cause}}"),
                stack="normal",
            )
        )
    )


def _gates(made: Dashboard) -> Dashboard:
    query = QUERIES
    state = query.state(table.ROLLOUT_GATE_STATE, tuple(GATE_COLORS), "alias", "gate")
    evidence = query.largest(table.ROLLOUT_GATE_LOG_EVIDENCE, "alias", "gate")
    return (
        made.with_row(Row("Gates"))
        .with_panel(
            timeline(
                "State of each gate",
                "pass: no effect of the size it looks for; more: needs more conversations; fail: sends back.",
                target(state, "{{alias}} {{gate}}"),
                GATE_COLORS,
                width=12,
                height=12,
            )
        )
        .with_panel(
            graph(
                "Evidence against the new variant",
                "Natural logarithm of the e-value. At the line (3.0 for alpha 0.05) a gate fails, for good.",
                COUNT,
                target(evidence, "{{alias}} {{gate}}"),
                width=12,
                limit=FAILED_LOG_EVIDENCE,
                soft_least=-3,
            ).height(12)
        )
    )


def _arms(made: Dashboard) -> Dashboard:
    query = QUERIES
    requests = query.rate(table.REQUESTS, "variant", where=['variant!="none"'])
    errors = query.rate(table.REQUESTS, "variant", where=[ERROR_CODES, 'variant!="none"'])
    answered = query.rate(table.REQUESTS, "variant", where=['code="200"', 'variant!="none"'])
    output = query.rate(table.TOKENS, "variant", where=['kind="completion"'])
    first = query.quantile(0.95, table.TIME_TO_FIRST_TOKEN_SECONDS, "variant")
    return (
        made.with_row(Row("Variants of the alias"))
        .with_panel(
            graph(
                "Errors",
                "Share of requests that failed. The gates compare conversations by arm, which this does not.",
                RATIO,
                target(f"({ratio(errors, requests)}) or 0 * ({requests} > 0)", "{{variant}}"),
                width=6,
            )
        )
        .with_panel(
            graph(
                *("Time to first token, p95", "Queue included.", SECONDS, target(first, "{{variant}}")),
                width=6,
            )
        )
        .with_panel(
            graph(
                "Output tokens per answer",
                "Longer answers cost more.",
                COUNT,
                target(ratio(output, answered), "{{variant}}"),
                width=6,
            )
        )
        .with_panel(
            graph(
                *("Requests", "Requests completed per second.", REQUESTS, target(requests, "{{variant}}")),
                width=6,
                stack="normal",
            )
        )
    )
