"""The table of replicas, as the state database has it."""

import json
import sys
import time
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from serving.duration import duration
from serving.replica import State
from serving.state.database import Picture, StateDatabase

WATCH_SECONDS = 1.0
SILENT_SECONDS = 10.0
COLOURS = {State.READY: "green", State.FAILED: "red", State.DRAINING: "yellow", State.STOPPING: "yellow"}


def print_once(database: StateDatabase, *, as_json: bool) -> None:
    """Print what there is now; StateAway if it can't be read."""
    listed = rows(database.picture(), time.time())
    if as_json:
        print(json.dumps(listed, indent=2))  # noqa: T201
        return
    # Without a terminal nothing is cut: a script, or grep, reads it.
    console = Console(soft_wrap=not sys.stdout.isatty())
    console.print(table(listed), soft_wrap=False, width=None if sys.stdout.isatty() else _width(listed))
    if not listed:
        name = database.engine.name
        Console(stderr=True, soft_wrap=True).print(f"nobody tells of replicas in {name}", highlight=False, markup=False)


def watch(database: StateDatabase, *, as_json: bool) -> None:
    """Show it again and again until interrupted; as JSON a line whenever something has changed."""
    if as_json or not sys.stdout.isatty():
        _print_changes(database, as_json=as_json)
        return
    with Live(table(rows(database.picture(), time.time())), screen=False, auto_refresh=False) as live:
        while True:
            time.sleep(WATCH_SECONDS)
            live.update(table(rows(database.picture(), time.time())), refresh=True)


def rows(picture: Picture, now: float) -> list[dict[str, Any]]:
    """One replica a row, in plain values."""
    owners = {owner.id: owner for owner in picture.pulse.owners}
    listed = []
    for owner_id, told in picture.told:
        owner = owners[owner_id]
        silent = now - owner.beat_at
        listed.append(
            {
                "replica": told.replica.id,
                "variant": told.replica.variant,
                "precision": told.replica.precision,
                "state": told.state.value,
                "since": told.since,
                "seconds": round(max(0.0, now - told.since), 1),
                "url": told.replica.url,
                "pid": told.pid,
                "reason": told.reason,
                "host": owner.host,
                "supervisor_pid": owner.pid,
                "supervisor_silent_seconds": round(silent, 1) if silent > SILENT_SECONDS else None,
            }
        )
    return listed


def table(listed: list[dict[str, Any]]) -> Table:
    """Lay rows out for people; the host is told where there are several."""
    several = len({row["host"] for row in listed}) > 1
    columns = [
        "replica",
        "variant",
        "precision",
        "state",
        "for",
        *(["host"] if several else []),
        "url",
        "pid",
        "reason",
    ]
    laid_out = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for row in listed:
        state = Text(row["state"], style=COLOURS.get(State(row["state"]), ""))
        cells: dict[str, str | Text] = {
            **{name: str(row[name]) for name in ("replica", "variant", "precision", "host", "url")},
            "state": state,
            "for": duration(row["seconds"]),
            "pid": str(row["pid"] or "-"),
            "reason": Text(_reason(row)),
        }
        laid_out.add_row(*(cells[name] for name in columns))
    return laid_out


def _reason(row: dict[str, Any]) -> str:
    silent = row["supervisor_silent_seconds"]
    if silent is None:
        return str(row["reason"])
    word = f"told {duration(silent)} ago: its supervisor, process {row['supervisor_pid']} on {row['host']}, is silent"
    return "; ".join(filter(None, [row["reason"], word]))


def _width(listed: list[dict[str, Any]]) -> int:
    """Wide enough that no row breaks."""
    longest = max((sum(len(str(value)) for value in row.values()) + len(_reason(row)) for row in listed), default=0)
    return max(120, longest + 40)


def _print_changes(database: StateDatabase, *, as_json: bool) -> None:
    before: list[dict[str, Any]] | None = None
    while True:
        listed = rows(database.picture(), time.time())
        lasting = [{**row, "seconds": None, "supervisor_silent_seconds": None} for row in listed]
        if lasting != before:
            if as_json:
                print(json.dumps(listed), flush=True)  # noqa: T201
            else:
                print_once(database, as_json=False)
        before = lasting
        time.sleep(WATCH_SECONDS)
