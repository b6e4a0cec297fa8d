"""`quantgate demo` and other commands as processes: started, read, stopped or killed."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from serving.process import session_processes
from tests.fakes.running import wait_until

ROOT = Path(__file__).resolve().parents[2]
POLL_SECONDS = 0.2
LEAVE_SECONDS = 90


def environment(home: Path) -> dict[str, str]:
    """The environment of a command: a home of its own, and no coverage measurement, which would slow vLLM down."""
    rest = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    return {**rest, "QUANTGATE_HOME": str(home), "COLUMNS": "200"}


@dataclass(frozen=True, slots=True)
class Running:
    """A running command; stdout and stderr go to files."""

    process: subprocess.Popen[bytes]
    folder: Path

    @property
    def stdout(self) -> str:
        """What it wrote to stdout so far."""
        return (self.folder / "out").read_text()

    @property
    def stderr(self) -> str:
        """What it wrote to stderr so far."""
        return (self.folder / "err").read_text()

    def wait(self, deadline_seconds: float) -> int:
        """Wait for its exit code."""
        return self.process.wait(deadline_seconds)

    def stop(self, sent: signal.Signals = signal.SIGINT) -> int:
        """Send a signal and wait for the exit code."""
        self.process.send_signal(sent)
        return self.wait(LEAVE_SECONDS)


def start(folder: Path, home: Path, *words: str) -> Running:
    """Run `quantgate WORDS` in the background."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "out").open("wb") as out, (folder / "err").open("wb") as err:
        command = [sys.executable, "-m", "quantgate", *words]
        process = subprocess.Popen(command, cwd=ROOT, env=environment(home), stdout=out, stderr=err)
    return Running(process, folder)


def until(condition: Callable[[], object], deadline_seconds: float, running: Running | None = None) -> None:
    """Wait for a condition; AssertionError with the end of stderr if the process ends, or at the deadline."""

    def look() -> str | None:
        if condition():
            return "met"
        return "ended" if running is not None and running.process.poll() is not None else None

    outcome = "too late"
    with suppress(TimeoutError):
        outcome = wait_until(look, deadline_seconds, POLL_SECONDS)
    assert outcome == "met", f"{outcome}: {running.stderr[-2000:] if running else ''}"


def noted_sessions(home: Path) -> dict[int, str]:
    """The process ledger of a home: the record of each replica by its session."""
    return {int(note.stem): note.read_text() for note in (home / "running").glob("*.json")}


def alive(sessions: dict[int, str]) -> list[int]:
    """All processes of these sessions."""
    return [pid for session in sessions for pid in session_processes(session)]


def address(running: Running) -> str:
    """The base URL for clients of a demo that serves."""
    match = re.search(r"Serving on (http://\S+)", running.stdout)
    assert match is not None
    return match[1]


def admin_address(running: Running) -> str:
    """The URL of the admin port of a demo that serves."""
    match = re.search(r"\(admin (http://[^)]+)\)", running.stdout)
    assert match is not None
    return match[1]


def listens(running: Running) -> tuple[str, str]:
    """The URLs of the client port and of the admin port of `quantgate up`."""
    match = re.search(r"listening on (http://\S+), admin on (http://\S+)", running.stderr)
    assert match is not None
    return match[1], match[2]


def processes_of(home: Path) -> list[int]:
    """All processes with this home in their environment or on their command line."""
    mark = os.fsencode(home)
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdecimal() and mark in (entry / "environ").read_bytes() + (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found
