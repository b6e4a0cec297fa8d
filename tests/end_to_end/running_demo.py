"""The demo as a process: started as a person would, read line by line, stopped or killed."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from serving.process import session_processes

ROOT = Path(__file__).resolve().parents[2]
POLL_SECONDS = 0.2
LEAVE_SECONDS = 90


def environment(home: Path) -> dict[str, str]:
    """What the demo gets: its own home, and no measuring of coverage, which would slow three vLLMs down."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    return {**kept, "QUANTGATE_HOME": str(home), "COLUMNS": "200"}


@dataclass(frozen=True, slots=True)
class Running:
    """A verb of quantgate that runs; stdout and stderr go to files."""

    process: subprocess.Popen[bytes]
    folder: Path

    @property
    def out(self) -> str:
        """What it printed so far."""
        return (self.folder / "out").read_text()

    @property
    def told(self) -> str:
        """What it told on stderr so far."""
        return (self.folder / "err").read_text()

    def wait(self, deadline_seconds: float) -> int:
        """Its exit code, when it is done."""
        return self.process.wait(deadline_seconds)

    def stop(self, sent: signal.Signals = signal.SIGINT) -> int:
        """Ask it to stop, and wait until it has."""
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
    """Wait until something is so; AssertionError with the last words if it isn't in time or the process ended."""
    deadline = time.monotonic() + deadline_seconds
    while not condition():
        ended = running is not None and running.process.poll() is not None
        assert not ended, running.told[-2000:] if running else ""
        assert time.monotonic() < deadline, running.told[-2000:] if running else "too late"
        time.sleep(POLL_SECONDS)


def noted_sessions(home: Path) -> dict[int, str]:
    """The sessions of the replicas that supervisors have noted."""
    return {int(note.stem): note.read_text() for note in (home / "running").glob("*.json")}


def alive(sessions: dict[int, str]) -> list[int]:
    """Every process that is left of some sessions."""
    return [pid for session in sessions for pid in session_processes(session)]


def address(running: Running) -> str:
    """Where a demo that serves can be asked."""
    match = re.search(r"Serving on (http://\S+)", running.out)
    assert match is not None
    return match[1]


def admin_address(running: Running) -> str:
    """Where the operators of a demo that serves ask."""
    match = re.search(r"\(admin (http://[^)]+)\)", running.out)
    assert match is not None
    return match[1]


def listens(running: Running) -> tuple[str, str]:
    """Where `quantgate up` can be asked, by clients and by operators."""
    match = re.search(r"listening on (http://\S+), admin on (http://\S+)", running.told)
    assert match is not None
    return match[1], match[2]


def processes_of(home: Path) -> list[int]:
    """Every process that was given this home, or that names it on its command line."""
    mark = os.fsencode(home)
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdecimal() and mark in (entry / "environ").read_bytes() + (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found
