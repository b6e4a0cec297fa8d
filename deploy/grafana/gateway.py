"""The gateway itself: what it costs, whether it keeps up, and what it does about failures."""

from grafana_foundation_sdk.builders.dashboard import Dashboard, Row

from deploy.grafana.panels import (
    BYTES,
    COUNT,
    GREEN,
    ORANGE,
    PER_SECOND,
    RATIO,
    RED,
    REQUESTS,
    SECONDS,
    YELLOW,
    graph,
    number,
    row_target,
    rows,
    target,
)
from deploy.grafana.panels import dashboard as empty_dashboard
from deploy.grafana.queries import Queries
from gateway.observability.metrics import table

QUERIES = Queries(("instance",))


def dashboard() -> Dashboard:
    """Build the dashboard."""
    description = "The gateway's workers: overhead, event loop, memory, connections, retries and configuration."
    made = empty_dashboard("gateway", "Gateway", description, ["instance"])
    for add in (_now, _cost, _connections, _failures, _configuration):
        made = add(made)
    return made


def _now(made: Dashboard) -> Dashboard:
    query = QUERIES
    overhead, lag = (query.quantile(0.99, spec) for spec in (table.OVERHEAD_SECONDS, table.EVENT_LOOP_LAG_SECONDS))
    resident = query.process("process_resident_memory_bytes")
    refused = query.increase(table.CONFIG_RELOADS, where=['outcome!="applied"'])
    left = f"min({query.select(table.CERTIFICATE_EXPIRATION_SECONDS)}) - time()"
    day = 86400
    return (
        made.with_panel(
            number(
                *("Workers", "Gateway processes that are scraped.", COUNT),
                target(f"count({query.select(table.BUILD_INFO)})"),
                *((None, RED), (1, GREEN)),
            )
        )
        .with_panel(
            number(
                *("Overhead, p99", "Time spent on a request before it is sent.", SECONDS, target(overhead)),
                *((None, GREEN), (0.01, YELLOW), (0.1, RED)),
            )
        )
        .with_panel(
            number(
                *("Event loop lag, p99", "Delay of every streamed token.", SECONDS, target(lag)),
                *((None, GREEN), (0.025, YELLOW), (0.1, RED)),
            )
        )
        .with_panel(number("Memory", "Resident memory of all workers.", BYTES, target(f"sum({resident})")))
        .with_panel(
            number(
                *("In flight", "Requests being processed, queued ones included.", COUNT),
                target(query.total(table.REQUESTS_IN_FLIGHT)),
            )
        )
        .with_panel(
            number(
                *("State database", "1: can be read; 0: the last revision stays in force.", COUNT),
                target(f"min({query.largest(table.STATE_DATABASE_UP, 'instance')})"),
                *((None, RED), (1, GREEN)),
            )
        )
        .with_panel(
            number(
                *("Quotas local", "1: without the state database, limits of keys are not shared.", COUNT),
                target(f"max({query.largest(table.QUOTA_LOCAL, 'instance')})"),
                *((None, GREEN), (1, RED)),
            )
        )
        .with_panel(
            number(
                *("Reloads refused", "Configurations refused or applied in part, in the time shown.", COUNT),
                target(refused),
                *((None, GREEN), (1, RED)),
            )
        )
        .with_panel(
            number(
                *(
                    "Next certificate",
                    "Until the first PEM file of a replica, or of the clients' port, expires.",
                    SECONDS,
                    target(left),
                ),
                *((None, RED), (14 * day, ORANGE), (30 * day, GREEN)),
            )
        )
    )


def _cost(made: Dashboard) -> Dashboard:
    query = QUERIES
    shares = (0.5, 0.99)
    overhead = [target(query.quantile(share, table.OVERHEAD_SECONDS), f"p{share * 100:.0f}") for share in shares]
    lag = target(query.quantile(0.99, table.EVENT_LOOP_LAG_SECONDS, "instance"), "{{instance}}")
    return (
        made.with_row(Row("Cost"))
        .with_panel(
            graph(
                "Overhead",
                "Time that the gateway spends on a request before sending it to its first replica, without the queue.",
                SECONDS,
                *overhead,
                width=6,
            )
        )
        .with_panel(
            graph(
                "Event loop lag",
                "p99 by worker: streams are delayed by it.",
                SECONDS,
                lag,
                width=6,
                limit=0.1,
            )
        )
        .with_panel(
            graph(
                "CPU",
                "Cores in use; a worker can use one.",
                COUNT,
                target(query.process("process_cpu_seconds_total", "rate"), "{{instance}}"),
                width=6,
                limit=0.9,
            )
        )
        .with_panel(
            graph(
                "Memory",
                "Resident memory by worker, and what of it request bodies take (gateway.memory_bytes limits that).",
                BYTES,
                target(query.process("process_resident_memory_bytes"), "{{instance}}"),
                target(query.total(table.REQUEST_BODY_BYTES), "request bodies"),
                width=6,
            )
        )
    )


def _connections(made: Dashboard) -> Dashboard:
    query = QUERIES
    files = f"{query.process('process_open_fds')} / {query.process('process_max_fds')}"
    cut = query.rate(table.CLIENTS_CUT, "reason")
    return (
        made.with_row(Row("Clients"))
        .with_panel(
            graph(
                "Connections",
                "active: a request is being answered.",
                COUNT,
                target(query.total(table.CLIENT_CONNECTIONS, "state"), "{{state}}"),
                width=6,
                stack="normal",
            )
        )
        .with_panel(
            graph(
                "Requests in flight",
                "By endpoint, queued ones included.",
                COUNT,
                target(query.total(table.REQUESTS_IN_FLIGHT, "endpoint"), "{{endpoint}}"),
                width=6,
                stack="normal",
            )
        )
        .with_panel(
            graph("Open files", "Share of the limit of the process.", RATIO, target(files, "{{instance}}"), width=6)
        )
        .with_panel(
            graph(
                "Heartbeats and aborted clients",
                "Events that keep idle streams open, and connections that the gateway aborted.",
                PER_SECOND,
                target(query.rate(table.HEARTBEATS), "heartbeats"),
                target(cut, "{{reason}}"),
                width=6,
            )
        )
    )


def _failures(made: Dashboard) -> Dashboard:
    query = QUERIES
    breakers = query.largest(table.REPLICA_BREAKER, "replica", "state", where=['state!="closed"'])
    moves = query.rate(table.SESSION_MOVES, "direction")
    switches = query.rate(table.LADDER_SWITCHES, "to")
    return (
        made.with_row(Row("Failures and moves"))
        .with_panel(
            graph(
                "Retries",
                "Attempts after the first one, by the error of the failed attempt; those of clients' SDKs.",
                REQUESTS,
                target(query.rate(table.RETRIES, "code"), "{{code}}"),
                target(query.rate(table.CLIENT_RETRIES), "by clients"),
                width=6,
            )
        )
        .with_panel(
            graph(
                "Retries refused",
                "poison: two replicas broke during the request; attempts: three were made; budget: gateway.retries.",
                REQUESTS,
                target(query.rate(table.RETRIES_REFUSED, "reason"), "{{reason}}"),
                width=6,
            )
        )
        .with_panel(
            graph(
                "Breakers not closed",
                "Replicas that get no requests, or one to try.",
                COUNT,
                target(f"sum by (state) ({breakers})", "{{state}}"),
                width=6,
                stack="normal",
            )
        )
        .with_panel(
            graph(
                "Moves between rungs",
                "Conversations that changed their variant, and rungs that started or stopped to spill.",
                PER_SECOND,
                target(moves, "conversations {{direction}}"),
                target(switches, "rungs: {{to}}"),
                width=6,
            )
        )
    )


def _configuration(made: Dashboard) -> Dashboard:
    query = QUERIES
    reloads = query.increase(table.CONFIG_RELOADS, "outcome", over="$__interval")
    columns = {
        "version": (COUNT, query.largest(table.BUILD_INFO, "instance", "version", "python")),
        "uptime": (SECONDS, f"time() - max by (instance) ({query.process('process_start_time_seconds')})"),
        "log lines dropped": (COUNT, query.increase(table.ACCESS_LOG_LINES_DROPPED, "instance")),
    }
    return (
        made.with_row(Row("Configuration"))
        .with_panel(
            graph(
                *("Configuration reloads", "By outcome.", COUNT, target(reloads, "{{outcome}}")),
                width=12,
                stack="normal",
            ).height(6)
        )
        .with_panel(
            graph(
                "Usage not in the state database",
                "Requests that wait to be written, and those that were lost as the database was away for too long.",
                COUNT,
                target(query.total(table.USAGE_PENDING_REQUESTS), "pending"),
                target(query.increase(table.USAGE_LOST_REQUESTS, over="$__interval"), "lost"),
                width=12,
            ).height(6)
        )
        .with_panel(
            rows(
                "Workers",
                "Version, time since the start, and lines of the access log that were dropped in the time shown.",
                "instance",
                {name: (unit, row_target(expression)) for name, (unit, expression) in columns.items()},
                height=6,
            )
        )
    )
