"""Processes under measurement: started, awaited, read, and ended with all that they started."""

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from config.load import process_environment

ROOT = Path(__file__).resolve().parents[3]
START_SECONDS = 90.0
END_SECONDS = 15.0
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class NotThere(Exception):
    """Something can't be measured here; the message says why."""


@contextmanager
def running(
    argv: Sequence[str], log: Path, extra: Mapping[str, str] | None = None, folder: Path = ROOT
) -> Iterator[int]:
    """Run a program in a checkout while the block runs, its output goes to a file; yields its process id."""
    environment = {**process_environment(), **(extra or {})}
    with log.open("wb") as output:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            cwd=folder,  # the code of this checkout runs
            start_new_session=True,
        )
    try:
        yield process.pid
    finally:
        # It leads a group of its own, so this reaches what it started, and nobody else.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def until(look: Callable[[], bool], what: str, log: Path, seconds: float = START_SECONDS) -> None:
    """Look until it is so; NotThere, with the end of the log, if it isn't in time."""
    ends_at = time.monotonic() + seconds
    while not look():
        if time.monotonic() > ends_at:
            raise NotThere(f"{what} did not answer within {seconds:g} s: {log.read_text(errors='replace')[-500:]}")
        time.sleep(0.005)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def tree(pid: int) -> list[int]:
    """A process and all that come from it."""
    found = [pid]
    for each in found:
        for children in Path(f"/proc/{each}/task").glob("*/children"):
            found += map(int, children.read_text().split())
    return found


def cpu_seconds(pid: int) -> float:
    """What a process tree has computed so far, to the nanosecond: first field of `schedstat`, thread by thread.

    The kernel's documentation: Documentation/scheduler/sched-stats.rst. Threads that have ended are not in it.
    """
    return (
        sum(
            int(thread.read_text().split()[0])
            for each in tree(pid)
            for thread in Path(f"/proc/{each}/task").glob("*/schedstat")
        )
        / 1e9
    )


def resident_bytes(pid: int) -> int:
    """What a process tree has in memory; shared pages count for each process."""
    return sum(int(Path(f"/proc/{each}/statm").read_text().split()[1]) * _PAGE_BYTES for each in tree(pid))
