"""`quantgate ps`: a line per replica, at any width, with the requests in its engine."""

import asyncio
import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios
import time
from io import StringIO
from pathlib import Path
from socket import gethostname

import httpx
import pytest
from rich.console import Console

from serving.ps import COLUMNS, WIDE_COLUMNS, requests_in_engines, rows, table
from serving.replica import Replica, State
from serving.state.database import Heartbeat, Owner, ReplicaRecord, Snapshot, StateDatabase
from tests.fakes.running import ROOT, eventually, running_fake

NOW = time.time()
CAUSE = "next start at 14:32:05: ended with exit code 1: ValueError: no such\nkernel for this processor " * 5


def told(name: str, state: State, reason: str = "", url: str = "http://127.0.0.1:40000") -> ReplicaRecord:
    """A replica as its supervisor publishes it."""
    return ReplicaRecord(Replica(f"{name}-1", name, "int4", url, f"{name}-1"), state, reason, NOW - 100, 4242)


ROWS = (told("qwq-32b-w4a16-g128", State.FAILED, CAUSE), told("a", State.READY), told("b", State.STARTING, CAUSE))


def snapshot(*replicas: ReplicaRecord, host: str = "") -> Snapshot:
    """What one supervisor publishes."""
    owner = Owner("owner", host or gethostname(), 1, beat_at=NOW)
    return Snapshot(Heartbeat("epoch", 1, (owner,)), tuple(("owner", each) for each in replicas))


def printed(width: int, *, wide: bool = False) -> list[str]:
    """The table's lines at a width."""
    file = StringIO()
    listed = rows(snapshot(*ROWS), NOW, {("owner", "a-1"): 17})
    Console(width=width, file=file).print(table(listed, wide=wide))
    return file.getvalue().splitlines()


@pytest.mark.parametrize("width", [40, 80, 120, 400])
def test_a_row_is_one_line(width: int) -> None:
    """At every width each replica has one line that fits."""
    lines = printed(width)
    assert len(lines) == 1 + len(ROWS)
    assert all(len(line) <= width for line in lines)


def test_80_columns_cut_only_the_reason() -> None:
    """In 80 columns everything but the reason is whole, and the reason begins with what the replica waits for."""
    header, failed, ready, _ = printed(80)
    assert tuple(header.split()) == COLUMNS
    assert failed.split()[:5] == ["qwq-32b-w4a16-g128-1", "int4", "failed", "1m40s", "-"]
    assert failed.split(maxsplit=5)[5].startswith("next start at 14:32:05")
    assert failed.endswith("…")
    assert ready.split() == ["a-1", "int4", "ready", "1m40s", "17"]


def publish(folder: Path, *replicas: ReplicaRecord) -> Path:
    """Put replicas into a state database; returns the configuration that names it."""
    config = folder / "quantgate.yaml"
    config.write_text("gateway: {state: 'sqlite:///state.db'}\n")
    database = StateDatabase.at(f"sqlite:///{folder}/state.db")
    database.publish(Owner("owner", gethostname(), 1), replicas, time.time())
    database.close()
    return config


def ps(config: Path, *options: str) -> list[str]:
    """The command line of `quantgate ps`."""
    return [sys.executable, str(ROOT / "quantgate.py"), "ps", str(config), *options]


def test_a_terminal_of_80_columns(tmp_path: Path) -> None:
    """On a terminal no line is longer than it; with --wide nothing is cut."""
    config = publish(tmp_path, *ROWS)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
    environment |= {"TERM": "xterm", "NO_COLOR": "1"}
    shown = []
    for options in ([], ["--wide"]):
        subprocess.run(ps(config, *options), cwd=ROOT, env=environment, stdout=theirs, check=True)
        shown.append(os.read(ours, 100_000).decode())
    os.close(ours)
    os.close(theirs)
    narrow, wide = ([line for line in text.splitlines() if "-1 " in line] for text in shown)
    assert len(narrow) == len(wide) == len(ROWS)
    assert all(len(_plain(line).rstrip()) <= 80 for line in narrow)
    assert all("http://127.0.0.1:40000" in line for line in wide)
    assert sum(" ".join(CAUSE.split()) in line for line in wide) == 2


def test_a_pipe_gets_whole_lines(tmp_path: Path) -> None:
    """Into a pipe each replica is one line with its whole reason; --wide adds columns."""
    config = publish(tmp_path, *ROWS)
    for options, columns in ([], COLUMNS), (["--wide"], WIDE_COLUMNS):
        done = subprocess.run(ps(config, *options), cwd=ROOT, capture_output=True, text=True, check=True)
        header, *lines = done.stdout.splitlines()
        assert tuple(header.split()) == tuple(name for name in columns if name != "host")
        assert len(lines) == len(ROWS)
        assert sum(" ".join(CAUSE.split()) in line for line in lines) == 2


async def test_requests_in_flight(tmp_path: Path) -> None:
    """A ready replica's engine is asked; one that does not answer, or that is out of reach, has no number."""
    async with running_fake("--fake-stall-after-tokens", "1", served="m1") as fake, httpx.AsyncClient() as client:
        body = {"model": "m1", "prompt": "x", "max_tokens": 8}
        asking = asyncio.create_task(client.post(f"{fake.url}/v1/completions", json=body, timeout=60))
        replicas = (told("busy", State.READY, url=fake.url), told("gone", State.READY, url="http://127.0.0.1:1"))

        async def counted() -> bool:
            found = await requests_in_engines(snapshot(*replicas), {})
            return found == {("owner", "busy-1"): 1, ("owner", "gone-1"): None}

        await eventually(counted)
        assert await requests_in_engines(snapshot(*replicas, host="another"), {}) == {}
        config = publish(tmp_path, *replicas)
        listed = await asyncio.to_thread(
            subprocess.run, ps(config, "--json"), cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert {row["replica"]: row["requests"] for row in json.loads(listed.stdout)} == {"busy-1": 1, "gone-1": None}
        asking.cancel()


def _plain(line: str) -> str:
    """A line without its escape sequences."""
    plain, _, rest = line.partition("\x1b[")
    while rest:
        _, _, rest = rest.partition("m")
        more, _, rest = rest.partition("\x1b[")
        plain += more
    return plain
