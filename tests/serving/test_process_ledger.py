"""What supervisors record of the replicas that they run."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from serving.errors import StartFailed
from serving.process import session_processes
from serving.process_ledger import ProcessLedger, ProcessRecord
from tests.fakes.running import ROOT
from tests.serving.supervised import noted_session

# A supervisor that records a process of its own and waits for its end.
OWNER = """
import subprocess, sys
from pathlib import Path
from serving.process_ledger import ProcessLedger
child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True)
with ProcessLedger(Path(sys.argv[1])).running("int4-1", "digest", 8101, child.pid):
    print("noted", flush=True)
    sys.stdin.read()
"""


async def test_notes_of_a_killed_supervisor_are_found(tmp_path: Path) -> None:
    """A living supervisor's records are its own; after kill -9 they tell what it left, which can be ended."""
    folder = tmp_path / "running"
    ledger = ProcessLedger(folder)
    command = [sys.executable, "-c", OWNER, str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        await asyncio.to_thread(owner.stdout.readline)
        session = noted_session(tmp_path)
        assert ledger.orphaned() == []
        assert session_processes(session) == [session]
        os.kill(session, 19)  # SIGSTOP: or it would end with the pipe of its parent
        owner.kill()
    (record,) = ledger.orphaned()
    assert (record.replica, record.launch, record.port, record.session) == ("int4-1", "digest", 8101, session)
    await ledger.end(record)
    assert session_processes(session) == []
    assert list(folder.iterdir()) == []


async def test_notes_that_mean_nobody_are_thrown_away(tmp_path: Path) -> None:
    """A broken record, one of another boot and one whose numbers were given out again mean nothing."""
    ledger = ProcessLedger(tmp_path)
    with ledger.running("mine", "digest", 8101, os.getpid()):
        (good,) = tmp_path.glob("*.json")
        mine = json.loads(good.read_text())
    with subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True
    ) as bystander:
        stale = {**mine, "owner": 2**22 + 1, "session": bystander.pid}
        (tmp_path / "broken.json").write_text("{")
        (tmp_path / "boot.json").write_text(json.dumps({**stale, "boot": "another"}))
        (tmp_path / "reused.json").write_text(json.dumps({**stale, "session_started_ticks": 1}))
        assert ledger.orphaned() == []
        assert bystander.poll() is None
        assert list(tmp_path.iterdir()) == []
        bystander.communicate(b"\n")


def test_a_note_that_cannot_be_written_is_a_failed_start(tmp_path: Path) -> None:
    """Without a record nothing may run, since nobody would find it again."""
    (tmp_path / "running").write_text("a file, where a folder should be")
    with (
        pytest.raises(StartFailed, match="can't be written"),
        ProcessLedger(tmp_path / "running").running("int4-1", "digest", 8101, os.getpid()),
    ):
        pytest.fail("it was noted")


def test_a_note_reads_back_as_it_was(tmp_path: Path) -> None:
    """What a supervisor writes, the next one reads."""
    with ProcessLedger(tmp_path).running("int4-1b", "digest", 8101, os.getpid()):
        (path,) = tmp_path.glob("*.json")
        record = ProcessRecord(**json.loads(path.read_text()))
    assert (record.replica, record.owner, record.session) == ("int4-1b", os.getpid(), os.getpid())
