"""A child process and all that it starts."""

import os
import signal
import sys
from pathlib import Path

import pytest

from serving.command import Command
from serving.errors import StartFailed
from serving.process import Child, process_facts, root_cause, session_processes
from tests.fakes.running import eventually

# A leader that plays vLLM: starts a child in its session, ignores SIGTERM, and waits.
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("up", flush=True)
time.sleep(600)
"""

HEEDFUL = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
print("up", flush=True)
time.sleep(600)
"""


def child(folder: Path, program: str, patience_seconds: float = 5.0) -> Child:
    """A child that runs a Python program."""
    command = Command((sys.executable, "-c", program), dict(os.environ))
    return Child(command, folder / "logs" / "child.log", patience_seconds)


async def test_stubborn_child_is_killed_with_its_own_children(tmp_path: Path) -> None:
    """SIGTERM ignored, one grandchild: after the block no process of the session is left."""
    running = child(tmp_path, STUBBORN, patience_seconds=0.1)
    async with running:
        running.release()
        await eventually(lambda: len(session_processes(running.pid)) == 2)
        session = running.pid
    assert running.exit_code == -signal.SIGKILL
    assert session_processes(session) == []


async def test_orphans_of_a_dead_leader_are_killed(tmp_path: Path) -> None:
    """SIGKILL of the first process leaves the others, as with vLLM; stopping still ends them."""
    async with child(tmp_path, STUBBORN) as running:
        running.release()
        await eventually(lambda: len(session_processes(running.pid)) == 2)
        os.kill(running.pid, signal.SIGKILL)
        assert await running.wait() == f"exit code {-signal.SIGKILL}"
        assert len(session_processes(running.pid)) == 1
    assert session_processes(running.pid) == []


async def test_patient_stop_lets_it_finish(tmp_path: Path) -> None:
    """A child that heeds SIGTERM leaves with its own exit code."""
    program = HEEDFUL
    async with child(tmp_path, program) as running:
        running.release()
        await eventually(lambda: running.log.read_text() == "up\n")
    assert running.exit_code == 7


async def test_missing_program_is_told_by_name(tmp_path: Path) -> None:
    """A program that isn't there ends the gate, and the log names it."""
    async with Child(Command(("/nowhere/python",), {}), tmp_path / "log") as running:
        running.release()
        assert await running.wait() == "exit code 127"
        assert "/nowhere/python" in running.last_words()


async def test_nothing_begins_before_it_is_released(tmp_path: Path) -> None:
    """Behind the gate a child has its number and does nothing; without its parent it ends there."""
    async with child(tmp_path, HEEDFUL) as running:
        assert session_processes(running.pid) == [running.pid]
        assert running.log.read_text() == ""
    assert session_processes(running.pid) == []


async def test_no_room_for_a_log_is_a_failed_start(tmp_path: Path) -> None:
    """Where the log can't be opened nothing is started."""
    (tmp_path / "logs").write_text("a file, where a folder should be")
    with pytest.raises(StartFailed, match="logs"):
        await child(tmp_path, HEEDFUL).__aenter__()


def test_a_process_that_is_gone_has_no_facts() -> None:
    """Looking up a process number that nobody has is no error."""
    assert process_facts(2**22 + 1) is None


@pytest.mark.parametrize(
    "log,cause",
    [
        ("", "it printed nothing"),
        ("hello\nbye\n", "bye"),
        (
            "(Worker pid=3) ERROR 11-22 20:06:58 [multiproc_executor.py:1063] ValueError: Marlin does not support it\n"
            "(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above.\n",
            "ValueError: Marlin does not support it",
        ),
        (
            '{"level": "ERROR", "message": "ValueError: no kernel"}\n{"level": "INFO", "message": "bye"}\n{"half',
            "ValueError: no kernel",
        ),
        ("OSError: [Errno 98] Address already in use\n", "OSError: [Errno 98] Address already in use"),
    ],
)
def test_root_cause(log: str, cause: str) -> None:
    """The engine's own error is told, not the server's that follows from it."""
    assert root_cause(log) == cause
