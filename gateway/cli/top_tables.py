"""A status as text and tables for a terminal. Pure; colors only repeat what words say."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from gateway.status.values import AliasStatus, ReplicaView, RungStatus, Status, TrafficStatus
from serving.duration import duration

BARS = "▁▂▃▄▅▆▇█"
SHARE_CELLS = 10
STYLES = {
    "answers": "green",
    "ready": "green",
    "spilling": "yellow",
    "no_replica": "red",
    "rejected": "dim",
    "starting": "yellow",
    "draining": "yellow",
    "failed": "red",
}
Section = tuple[str, RenderableType]


def heading(status: Status, address: str) -> Text:
    """One line about the gateway itself."""
    gateway = status.gateway
    worker = gateway.worker
    parts = [
        f"quantgate {gateway.version} at {address}",
        f"up {duration(max(gateway.now_at - gateway.started_at, 0))}",
        f"{gateway.in_flight} in flight",
    ]
    if worker.of > 1:
        parts.append(f"worker {worker.number} of {worker.of}: only what this one sees")
    text = Text(" · ".join(parts), style="bold")
    if gateway.draining:
        text.append(" · draining", style="yellow")
    for away in filter(None, (gateway.state_database, gateway.kubernetes)):
        text.append(plain(f" · {away}"), style="red")
    return text


def sections(status: Status) -> tuple[Section, ...]:
    """All sections, with their titles."""
    return (
        ("Aliases", _aliases(status.aliases)),
        ("Traffic", _traffic(status.traffic)),
        ("Replicas", _replicas(status.replicas)),
        ("Variants", _variants(status)),
        ("Rollouts", _rollouts(status.rollouts)),
        ("Errors", _errors(status)),
    )


def share_bar(share: float | None) -> str:
    """A share as a bar with its percentage; empty if it is unknown."""
    if share is None:
        return ""
    return f"{'█' * round(share * SHARE_CELLS):{SHARE_CELLS}} {share:4.0%}"


def sparkline(values: Sequence[float]) -> str:
    """Values as bars, the highest is full; zero is a space."""
    highest = max(values, default=0.0)
    if highest <= 0:
        return " " * len(values)
    top = len(BARS) - 1
    return "".join(" " if value <= 0 else BARS[round(value / highest * top)] for value in values)


def seconds_text(seconds: float | None) -> str:
    """A wait: milliseconds, or seconds with one digit; `?` if it is unknown."""
    if seconds is None:
        return "?"
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _table(*columns: str, right: Sequence[str] = ()) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), expand=False)
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", header_style="dim")
    return table


def _add_row(table: Table, *cells: str | Text) -> None:
    """Add a row; text is not read as markup, and what would control the terminal is replaced."""
    table.add_row(*(cell if isinstance(cell, Text) else Text(plain(cell)) for cell in cells))


def plain(text: str) -> str:
    """Replace what is not printable."""
    return "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in text)


def _state(name: str) -> Text:
    return Text(name.replace("_", " "), style=STYLES.get(name, ""))


def _aliases(aliases: Sequence[AliasStatus]) -> RenderableType:
    if not aliases:
        return Text("none", style="dim")
    right = ("ready", "wait", "waiting", "requests")
    table = _table(
        *("alias", "ladder", "precision", "state", "ready", "wait", "share of requests", "requests", "waiting", "note"),
        right=right,
    )
    for alias in aliases:
        for place, rung in enumerate(alias.rungs):
            first = place == 0
            _add_row(
                table,
                *(_alias_name(alias) if first else "", rung.variant, rung.precision, _state(rung.state)),
                *(f"{rung.replicas_ready}/{rung.replicas}", seconds_text(rung.wait_seconds), share_bar(rung.share)),
                *(f"{rung.requests}", f"{alias.waiting}" if first else "", _note(alias, rung)),
            )
        if (canary := alias.canary) is not None:
            note = f"{canary.weight:.0%} of new conversations"
            _add_row(
                table,
                *("", canary.variant, canary.precision, Text("canary", style="cyan"), "", ""),
                *(share_bar(canary.share), f"{canary.requests}", "", note),
            )
    return table


def _alias_name(alias: AliasStatus) -> Text:
    return Text(plain(alias.name), style="bold")


def _note(alias: AliasStatus, rung: RungStatus) -> str:
    """Why a rung may not answer, what its gate does, or who answers and why."""
    if rung.rejected is not None:
        return rung.rejected
    parts = []
    answer = alias.answers_now
    if answer is not None and answer.variant == rung.variant:
        parts.append(f"{answer.replica} answers now ({answer.reason})")
    if rung.gate.state == "spilling":
        parts.append(f"spills {rung.gate.share_down:.0%} for {duration(rung.gate.seconds or 0)}")
    if rung is alias.rungs[0] and alias.floor:
        parts.append("floor " + ", ".join(f"{name} {limit:g}" for name, limit in alias.floor.items()))
    if rung is alias.rungs[-1] and alias.failed:
        parts.append(f"{alias.failed} of {alias.requests} failed")
    return "; ".join(parts)


def _traffic(traffic: TrafficStatus) -> RenderableType:
    recent = traffic.recent
    if recent is None or not recent.precisions:
        return Text("no requests in the last hour" if not traffic.points else "no requests now", style="dim")
    right = ("requests/s", "prompt tokens/s", "answer tokens/s")
    table = _table("precision", *right, "answer tokens, last hour", right=right)
    for precision, rate in sorted(recent.precisions.items()):
        history = [
            each.precisions[precision].answer_tokens_per_second if precision in each.precisions else 0.0
            for each in traffic.points
        ]
        _add_row(
            table,
            *(precision, f"{rate.requests_per_second:.2f}", f"{rate.prompt_tokens_per_second:.1f}"),
            *(f"{rate.answer_tokens_per_second:.1f}", Text(sparkline(history), style="cyan")),
        )
    if recent.failed_per_second:
        _add_row(table, Text("failed", style="red"), f"{recent.failed_per_second:.2f}")
    return table


def _replicas(replicas: Sequence[ReplicaView]) -> RenderableType:
    if not replicas:
        return Text("none", style="dim")
    right = ("in flight", "running", "waiting", "kv", "wait")
    table = _table(
        *("replica", "precision", "state", "for", "in flight", "running", "waiting", "kv", "wait", "note"), right=right
    )
    for each in replicas:
        kv_usage = "?" if each.kv_usage is None else f"{each.kv_usage:.0%}"
        _add_row(
            table,
            *(each.id, each.precision, _state(each.state), duration(each.state_seconds)),
            *(f"{each.in_flight}", _number(each.running), _number(each.waiting), kv_usage),
            *(seconds_text(each.wait_seconds), _replica_note(each)),
        )
    return table


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:g}"


def _replica_note(replica: ReplicaView) -> Text:
    parts = [] if replica.state == "ready" else [replica.reason]
    if replica.breaker != "closed":
        parts.append(f"breaker {replica.breaker}")
    if replica.silence != "responsive":
        parts.append(replica.silence)
    if replica.state == "ready" and not replica.load_known:
        parts.append("load unknown")
    return Text(plain("; ".join(filter(None, parts))), style="yellow")


def _variants(status: Status) -> RenderableType:
    if not status.variants:
        return Text("none", style="dim")
    right = ("GB", "tokens/s")
    table = _table("variant", "precision", "GB", "quality", "verdict", "tokens/s", right=right)
    for each in status.variants:
        size = "" if each.bytes is None else f"{each.bytes / 1e9:.1f}"
        measures = ", ".join(f"{measure.name} {measure.value:.4g}" for measure in each.measures)
        speed = "" if each.speed is None else f"{each.speed.total_tokens_per_second:.0f}"
        _add_row(table, *(each.name, each.precision, size, measures or each.source, each.verdict or each.source, speed))
    return table


def _rollouts(rollouts: Sequence[dict[str, Any]]) -> RenderableType:
    if not rollouts:
        return Text("none", style="dim")
    table = _table("alias", "change", "phase", "for", "weight", "gates", "waits for")
    for each in rollouts:
        gates = " ".join(f"{gate['name']}:{gate['verdict']}" for gate in each.get("gates", ()))
        waits = each.get("failure") or each.get("pause") or each.get("waits_for") or ""
        _add_row(
            table,
            *(str(each.get("alias")), f"{each.get('old')} -> {each.get('new')}", str(each.get("phase"))),
            *(duration(each.get("phase_seconds") or 0), f"{each.get('weight') or 0:.0%}", gates, str(waits)),
        )
    return table


def _errors(status: Status) -> RenderableType:
    if not status.errors:
        return Text("none", style="dim")
    table = _table("time", "alias", "code", "replica", "count", "message", "request id", right=("count",))
    for each in status.errors:
        at = datetime.fromtimestamp(each.at, UTC).strftime("%H:%M:%S")
        _add_row(table, at, each.alias, each.code, each.replica, f"{each.count}", each.message, each.request_id)
    return table
