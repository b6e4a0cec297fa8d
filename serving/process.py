"""One child process in its own session, as a state machine; its descendants end with it.

vLLM is three processes. Killing the first one leaves the others behind for ever (vllm#55510), SIGTERM can hang while
requests run, and during start-up it may be swallowed. So stopping is: SIGTERM, a deadline, SIGKILL for every process
of the session, and a look whether they are gone.
"""

import asyncio
import json
import os
import re
import signal
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from serving.command import Command
from serving.errors import StartFailed, StopFailed
from serving.shared_memory import free_segments, segments_of

KILL_DEADLINE_SECONDS = 10.0
LAST_WORDS_BYTES = 64 * 1024
LOG_PREFIX = re.compile(r"^(\([^)]*\) )?([A-Z]+ \d\d-\d\d [\d:]+ \[[^\]]*\] )?")


# Waits for a line and becomes the command; without the line (its parent was killed) it exits. So no command runs
# without a record, whenever the parent is killed.
_GATE = ("/bin/sh", "-c", 'read -r go && exec "$@" </dev/null', "gate")


@dataclass(slots=True)
class Child:
    """A command in its own session, which is stopped, whole, when the `async with` block ends.

    It starts behind a gate: its number is known, but it does nothing until `release()`.

    ==============  =========================================
    stop() while    does
    ==============  =========================================
    gated           SIGTERM
    running         SIGTERM, waits `patience_seconds`, SIGKILL
    exited          SIGKILL for what it left behind
    ==============  =========================================
    """

    command: Command
    log: Path
    patience_seconds: float = 2.0
    _process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Self:
        """Prepare the command; its output will go to the end of the log file. StartFailed if that can't be."""
        try:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("ab") as output:
                self._process = await asyncio.create_subprocess_exec(
                    *(*_GATE, *self.command.argv),
                    stdin=asyncio.subprocess.PIPE,
                    stdout=output,
                    stderr=output,
                    env=self.command.environment,
                    start_new_session=True,
                )
        except OSError as error:
            where = error.filename or self.command.argv[0]
            raise StartFailed(f"{self.command.argv[0]} can't be started: {where}: {error.strerror}") from error
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the command and everything it started."""
        await self.stop()

    def release(self) -> None:
        """Let the command begin."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(b"go\n")
        self._process.stdin.close()

    @property
    def pid(self) -> int:
        """Number of the first process, which is also its session's."""
        assert self._process is not None
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """How it ended; negative for a signal, None while it runs."""
        return self._process.returncode if self._process else None

    async def wait(self) -> str:
        """Wait without a limit until the first process has ended; return how it ended."""
        assert self._process is not None
        return f"exit code {await self._process.wait()}"

    async def stop(self) -> None:
        """End every process of the child; returns when none is left."""
        assert self._process is not None
        if self.exit_code is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)
            # Not wait_for: before Python 3.12 it may lose a cancellation.
            with suppress(TimeoutError):
                async with asyncio.timeout(self.patience_seconds):
                    await self.wait()
        await kill_session(self.pid)
        async with asyncio.timeout(KILL_DEADLINE_SECONDS):
            await self._process.wait()

    def last_words(self) -> str:
        """The line of the log that explains best why it ended."""
        return last_words(self.log)


@dataclass(slots=True)
class Adopted:
    """A session that an earlier supervisor started; like a Child, but for its exit code, which only its parent gets."""

    pid: int
    log: Path
    patience_seconds: float = 2.0
    _descriptor: int = -1
    _ended: asyncio.Event = field(default_factory=asyncio.Event)

    async def __aenter__(self) -> Self:
        """Take hold of its first process (pidfd_open(2)); StartFailed if that is gone already."""
        try:
            self._descriptor = os.pidfd_open(self.pid)
        except OSError as error:
            raise StartFailed(f"process {self.pid} can't be adopted: {error.strerror}") from error
        asyncio.get_running_loop().add_reader(self._descriptor, self._ended.set)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop it like a child."""
        try:
            await self.stop()
        finally:
            asyncio.get_running_loop().remove_reader(self._descriptor)
            os.close(self._descriptor)

    @property
    def exit_code(self) -> int | None:
        """None while it runs; -1 afterwards: the exit code of another process's child is unknown."""
        return -1 if self._ended.is_set() else None

    async def wait(self) -> str:
        """Wait until its first process has ended, however long that takes."""
        await self._ended.wait()
        return "an exit code that its first parent got"

    async def stop(self) -> None:
        """End every process of the session; returns when none is left."""
        if not self._ended.is_set():
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._descriptor, signal.SIGTERM)
            with suppress(TimeoutError):
                async with asyncio.timeout(self.patience_seconds):
                    await self._ended.wait()
        await kill_session(self.pid)

    def last_words(self) -> str:
        """The line of the log that explains best why it ended."""
        return last_words(self.log)


def last_words(log: Path) -> str:
    """Read the end of a log for its root cause."""
    try:
        with log.open("rb") as lines:
            lines.seek(max(0, lines.seek(0, os.SEEK_END) - LAST_WORDS_BYTES))
            return root_cause(lines.read().decode(errors="replace"))
    except OSError as error:
        return f"its log can't be read: {error.strerror}"


def root_cause(log: str) -> str:
    """Pick the engine's own error out of a vLLM log.

    The API server's last error only says that the engine failed; the cause is the last error before that one.
    """
    lines = [_message(line.strip()) for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if "Error: " in line and "Engine core initialization failed" not in line]
    chosen = errors[-1] if errors else (lines[-1] if lines else "it printed nothing")
    return LOG_PREFIX.sub("", chosen)[:400]


def _message(line: str) -> str:
    """What a line says, also where the log is JSON."""
    if not line.startswith("{"):
        return line
    try:
        message = json.loads(line)["message"]
    except (ValueError, LookupError):
        return line
    return message if isinstance(message, str) else line


@dataclass(frozen=True, slots=True)
class ProcessFacts:
    """Fields of /proc/PID/stat (proc(5)): state, session, and start in clock ticks since boot."""

    pid: int
    state: str
    session: int
    started_ticks: int


def process_facts(pid: int) -> ProcessFacts | None:
    """Look a process up; None if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return None
    return ProcessFacts(pid, fields[0], int(fields[3]), int(fields[19]))


def session_processes(session: int) -> list[int]:
    """Find every live process of a session."""
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
    facts = filter(None, map(process_facts, pids))
    return [each.pid for each in facts if each.session == session and each.state not in "ZX"]


async def kill_session(session: int) -> int:
    """SIGKILL every process of a session until none is left; returns how many there were. StopFailed if one stays."""
    killed: set[int] = set()
    segments: set[Path] = set()
    try:
        async with asyncio.timeout(KILL_DEADLINE_SECONDS):
            while left := session_processes(session):
                segments |= segments_of(left)
                for pid in left:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                killed.update(left)
                await asyncio.sleep(0.02)
    except TimeoutError:
        stuck = ", ".join(map(str, session_processes(session)))
        raise StopFailed(f"processes {stuck} of session {session} don't end, though killed; see dmesg") from None
    await asyncio.to_thread(free_segments, segments)  # it reads of every process of the machine
    return len(killed)
