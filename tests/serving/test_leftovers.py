"""Replicas that outlived their supervisor."""

import json
import os
import subprocess
import sys
from pathlib import Path

from serving.leftovers import Notebook
from serving.machine import free_port
from serving.process import session_processes
from tests.fakes.running import ROOT, eventually
from tests.serving.supervised import launch, ready, supervised

# A supervisor that runs one fake replica and tells when it is ready.
SUPERVISOR = """
import asyncio, sys
from pathlib import Path
from tests.serving.supervised import launch, ready, supervised

async def main():
    folder = Path(sys.argv[1])
    port = int(sys.argv[2]) or None
    async with supervised(folder, launch(folder, "int4", "--fake-spawn-child", port=port)) as registry:
        await ready(registry)
        (folder / "up").touch()
        await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_replicas_of_a_killed_supervisor_are_swept(tmp_path: Path) -> None:
    """After kill -9 of a supervisor a sweep ends its replicas, grandchildren too; a living one's are left alone."""
    notebook = Notebook(tmp_path / "running")
    with subprocess.Popen([sys.executable, "-c", SUPERVISOR, str(tmp_path), "0"], cwd=ROOT) as supervisor:
        await eventually((tmp_path / "up").exists)
        (note,) = (tmp_path / "running").glob("*.json")
        session = int(note.stem)
        assert await notebook.sweep() == []
        assert len(session_processes(session)) == 2
        supervisor.kill()
    assert len(session_processes(session)) == 2
    assert await notebook.sweep() == ["int4-1"]
    assert session_processes(session) == []
    assert list((tmp_path / "running").iterdir()) == []


async def test_notes_that_mean_nobody_are_thrown_away(tmp_path: Path) -> None:
    """A broken note, one of another boot and one whose numbers were given out again end nothing."""
    notebook = Notebook(tmp_path)
    with notebook.running("mine", os.getpid()):
        (good,) = tmp_path.glob("*.json")
        mine = json.loads(good.read_text())
    with subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True
    ) as bystander:
        stale = {**mine, "owner": 2**22 + 1, "session": bystander.pid}
        (tmp_path / "broken.json").write_text("{")
        (tmp_path / "boot.json").write_text(json.dumps({**stale, "boot": "another"}))
        (tmp_path / "reused.json").write_text(json.dumps({**stale, "session_started_ticks": 1}))
        assert await notebook.sweep() == []
        assert bystander.poll() is None
        assert list(tmp_path.iterdir()) == []
        bystander.communicate(b"\n")


async def test_port_that_leftovers_hold_is_free_again(tmp_path: Path) -> None:
    """The sweep comes before the look at the ports, or no supervisor with fixed ports could ever come back."""
    port = free_port()
    command = [sys.executable, "-c", SUPERVISOR, str(tmp_path), str(port)]
    with subprocess.Popen(command, cwd=ROOT) as supervisor:
        await eventually((tmp_path / "up").exists)
        supervisor.kill()
    async with supervised(tmp_path, launch(tmp_path, "int4", port=port)) as registry:
        assert (await ready(registry)).replica.url == f"http://127.0.0.1:{port}"
