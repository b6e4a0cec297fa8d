"""A supervisor is killed with kill -9, whatever its replica is doing; the next one has exactly one replica again."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from serving.machine import free_port
from serving.process import session_processes
from tests.fakes.running import ROOT, eventually
from tests.serving.supervised import launch, noted_session, noted_sessions, ready, supervised, supervising


@dataclass(frozen=True, slots=True)
class Row:
    """In which state the supervisor is killed, how the replica got there, and whether it is gone on with."""

    state: str
    args: tuple[str, ...] = ()
    stop: bool = False
    hold: bool = False
    resume: bool = False
    adopted: bool = True


DIES_BEFORE_THE_NOTE = """
import asyncio, os, sys
from pathlib import Path
from serving.command import Command
from serving.process import Child

async def main():
    child = Child(Command((sys.executable, "-c", "input()"), dict(os.environ)), Path(sys.argv[1]) / "log")
    await child.__aenter__()
    print(child.pid, flush=True)
    os.kill(os.getpid(), 9)

asyncio.run(main())
"""

ROWS = [
    Row("starting", ("--fake-start-delay", "2"), adopted=False),
    Row("warming", ("--fake-stall-before-first-byte",), resume=True),
    Row("ready"),
    Row("draining", stop=True, hold=True),
    Row("stopping", ("--fake-ignore-sigterm",), stop=True),  # what it was asked, it has not heard
]


@contextmanager
def supervisor(folder: Path, *args: str, settings: str = "{}") -> Iterator["subprocess.Popen[bytes]"]:
    """A supervisor in a process of its own; killed in the end."""
    command = [sys.executable, "-m", "tests.serving.supervisor_program", str(folder), settings, *args]
    with subprocess.Popen(command, cwd=ROOT) as process:
        yield process
        process.kill()


def states(folder: Path) -> list[str]:
    """The states that the replica has been in."""
    path = folder / "states"
    return path.read_text().split() if path.exists() else []


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.state)
async def test_next_supervisor_has_one_replica(tmp_path: Path, row: Row) -> None:
    """Healthy and unchanged it is adopted, otherwise ended and started anew; never are there two, none is forgotten."""
    args = ("--fake-spawn-child", *row.args)
    if row.hold:
        (tmp_path / "hold").touch()
    with supervisor(tmp_path, *args) as killed:
        await eventually(lambda: ("ready" if row.stop else row.state) in states(tmp_path) and noted_sessions(tmp_path))
        if row.stop:
            killed.send_signal(signal.SIGTERM)
            await eventually(lambda: row.state in states(tmp_path))
        before = noted_session(tmp_path)
    assert session_processes(before), "it should have outlived its supervisor"
    if row.resume:
        os.kill(before, signal.SIGUSR1)
    async with supervising(
        tmp_path, launch(tmp_path, "int4", *args), adoption_seconds=0.5, patience_seconds=0.5
    ) as next_one:
        status = await ready(next_one.registry)
        after = noted_session(tmp_path)
        assert (after == before) == row.adopted
        assert len(session_processes(after)) == 2
        assert row.adopted or session_processes(before) == []
        assert status.replica.max_model_len_tokens == 32768
    assert session_processes(after) == []
    assert noted_sessions(tmp_path) == set()


async def test_changed_launch_is_not_adopted(tmp_path: Path) -> None:
    """What runs with other settings than are wanted now is ended, and its port is free for the next."""
    port = free_port()
    with supervisor(tmp_path, settings=f'{{"port": {port}}}') as killed:
        await eventually(lambda: "ready" in states(tmp_path))
        before = noted_session(tmp_path)
        killed.kill()
    async with supervised(tmp_path, launch(tmp_path, "int4", port=port, max_num_seqs=4)) as registry:
        assert (await ready(registry)).replica.url == f"http://127.0.0.1:{port}"
        assert session_processes(before) == []


async def test_adopted_replica_that_crashes_is_started_again(tmp_path: Path) -> None:
    """A foreign child's end is seen, though its exit code isn't; from then on it is a child of our own."""
    with supervisor(tmp_path):
        await eventually(lambda: "ready" in states(tmp_path))
    async with supervised(tmp_path, launch(tmp_path, "int4")) as registry:
        await ready(registry)
        before = noted_session(tmp_path)
        os.kill(before, signal.SIGKILL)
        await eventually(lambda: noted_sessions(tmp_path) not in (set(), {before}))
        await ready(registry)


async def test_replica_that_died_too_is_started(tmp_path: Path) -> None:
    """After a reboot, or when all were killed, notes mean nothing: there is a new replica and no trace of the old."""
    with supervisor(tmp_path):
        await eventually(lambda: "ready" in states(tmp_path))
        before = noted_session(tmp_path)
    os.killpg(before, signal.SIGKILL)
    await eventually(lambda: not session_processes(before))
    async with supervised(tmp_path, launch(tmp_path, "int4")) as registry:
        await ready(registry)
        assert noted_session(tmp_path) != before


def test_kill_between_start_and_note_leaves_nothing(tmp_path: Path) -> None:
    """A replica begins only when it is noted, so a supervisor that dies before that leaves no process."""
    done = subprocess.run(
        [sys.executable, "-c", DIES_BEFORE_THE_NOTE, str(tmp_path)], cwd=ROOT, capture_output=True, check=False
    )
    assert done.returncode == -signal.SIGKILL
    asyncio.run(_gone(int(done.stdout)))


async def _gone(session: int) -> None:
    await eventually(lambda: not session_processes(session))
