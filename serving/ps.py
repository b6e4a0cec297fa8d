"""The table of replicas, as the state database has it, with the requests that their engines report."""

import asyncio
import json
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from config.field_types import is_loopback
from serving.duration import duration
from serving.probe import Probe
from serving.replica import Replica, State
from serving.state.database import Owner, ReplicaRecord, Snapshot, StateDatabase

WATCH_SECONDS = 1.0
SILENT_SECONDS = 10.0
ENGINE_SECONDS = 1.0  # for an engine to say how many requests it has
ANSWERING = frozenset({State.READY, State.DRAINING})
COLOURS = {State.READY: "green", State.FAILED: "red", State.DRAINING: "yellow", State.STOPPING: "yellow"}
COLUMNS = ("replica", "precision", "state", "for", "reqs", "reason")
WIDE_COLUMNS = ("replica", "variant", "precision", "state", "for", "reqs", "host", "url", "pid", "reason")

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Listing:
    """Reads the rows of `quantgate ps`; `keys` are those of replicas, by id or variant."""

    database: StateDatabase
    keys: Mapping[str, str]

    def rows(self) -> list[Row]:
        """Return one replica a row; StateAway if the state database can't be read."""
        snapshot = self.database.snapshot()
        return rows(snapshot, time.time(), asyncio.run(requests_in_engines(snapshot, self.keys)))


def print_once(listing: Listing, *, as_json: bool, wide: bool) -> None:
    """Print what there is now; StateAway if it can't be read."""
    listed = listing.rows()
    if as_json:
        print(json.dumps(listed, indent=2))  # noqa: T201
        return
    _print_table(listed, wide=wide)
    if not listed:
        name = listing.database.engine.name
        print(f"no supervisor publishes replicas in {name}", file=sys.stderr)  # noqa: T201


def _print_table(listed: list[Row], *, wide: bool) -> None:
    """Print a line per replica: cut at the width of a terminal, whole into a pipe or if `wide`."""
    console = Console()
    if console.is_terminal and not wide:
        console.print(table(listed, wide=wide))
        return
    console = Console(width=_width(listed))
    with console.capture() as captured:
        console.print(table(listed, wide=wide))
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))  # noqa: T201


def watch(listing: Listing, *, as_json: bool, wide: bool) -> None:
    """Show it again and again until interrupted; as JSON a line whenever something has changed."""
    if as_json or not sys.stdout.isatty():
        _print_changes(listing, as_json=as_json, wide=wide)
        return
    with Live(table(listing.rows(), wide=wide), screen=False, auto_refresh=False) as live:
        while True:
            time.sleep(WATCH_SECONDS)
            live.update(table(listing.rows(), wide=wide), refresh=True)


async def requests_in_engines(snapshot: Snapshot, keys: Mapping[str, str]) -> dict[tuple[str, str], int | None]:
    """Read the number of requests in each engine, from all senders, by owner and replica; None if it cannot be read."""
    owners = {owner.id: owner for owner in snapshot.heartbeat.owners}
    replicas = {
        (owner_id, record.replica.id): _with_key(record.replica, keys)
        for owner_id, record in snapshot.records
        if record.state in ANSWERING and _is_reachable(record, owners[owner_id])
    }
    async with Probe(ENGINE_SECONDS) as probe:
        counts = await asyncio.gather(*map(probe.requests_in_engine, replicas.values()))
    return dict(zip(replicas, counts, strict=True))


def _with_key(replica: Replica, keys: Mapping[str, str]) -> Replica:
    return replace(replica, api_key=keys.get(replica.id, keys.get(replica.variant)))


def _is_reachable(record: ReplicaRecord, owner: Owner) -> bool:
    """Whether an address means the same here as where its owner runs: a loopback address of another host does not."""
    host = record.replica.url.partition("://")[2].rpartition(":")[0]
    return not is_loopback(host) or owner.host == socket.gethostname()


def rows(snapshot: Snapshot, now: float, requests: Mapping[tuple[str, str], int | None]) -> list[Row]:
    """One replica a row, in plain values; `requests` is by owner and replica."""
    owners = {owner.id: owner for owner in snapshot.heartbeat.owners}
    listed = []
    for owner_id, record in snapshot.records:
        owner = owners[owner_id]
        silent = now - owner.beat_at
        listed.append(
            {
                "replica": record.replica.id,
                "variant": record.replica.variant,
                "precision": record.replica.precision,
                "state": record.state.value,
                "since": record.since,
                "seconds": round(max(0.0, now - record.since), 1),
                "requests": requests.get((owner_id, record.replica.id)),
                "url": record.replica.url,
                "pid": record.pid,
                "reason": record.reason,
                "host": owner.host,
                "supervisor_pid": owner.pid,
                "supervisor_silent_seconds": round(silent, 1) if silent > SILENT_SECONDS else None,
            }
        )
    return listed


def table(listed: list[Row], *, wide: bool = False) -> Table:
    """Lay rows out for people, one line each: what does not fit is cut, first of all the reason."""
    several = len({row["host"] for row in listed}) > 1
    columns = [name for name in (WIDE_COLUMNS if wide else COLUMNS) if name != "host" or several]
    laid_out = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for name in columns:
        # The only column that may be narrower than its content; its cells are not wrapped, either.
        laid_out.add_column(name, no_wrap=name != "reason", justify="right" if name == "reqs" else "left")
    for row in listed:
        cells: dict[str, str | Text] = {
            **{name: str(row[name]) for name in ("replica", "variant", "precision", "host", "url")},
            "state": Text(row["state"], style=COLOURS.get(State(row["state"]), "")),
            "for": duration(row["seconds"]),
            "reqs": "-" if row["requests"] is None else str(row["requests"]),
            "pid": str(row["pid"] or "-"),
            "reason": Text(" ".join(_reason(row).split()), no_wrap=True, overflow="ellipsis"),
        }
        laid_out.add_row(*(cells[name] for name in columns))
    return laid_out


def _reason(row: Row) -> str:
    silent = row["supervisor_silent_seconds"]
    if silent is None:
        return str(row["reason"])
    word = f"as of {duration(silent)} ago: its supervisor, process {row['supervisor_pid']} on {row['host']}, is silent"
    return "; ".join(filter(None, [row["reason"], word]))


def _width(listed: list[Row]) -> int:
    """Wide enough that no row breaks."""
    longest = max((sum(len(str(value)) for value in row.values()) + len(_reason(row)) for row in listed), default=0)
    return max(120, longest + 40)


def _print_changes(listing: Listing, *, as_json: bool, wide: bool) -> None:
    before: list[Row] | None = None
    while True:
        listed = listing.rows()
        lasting = [{**row, "seconds": None, "requests": None, "supervisor_silent_seconds": None} for row in listed]
        if lasting != before:
            if as_json:
                print(json.dumps(listed), flush=True)  # noqa: T201
            else:
                _print_table(listed, wide=wide)
        before = lasting
        time.sleep(WATCH_SECONDS)
