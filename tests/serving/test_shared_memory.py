"""Named shared memory of processes that were killed."""

import asyncio
import subprocess
import sys
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

from serving.process import kill_session
from serving.shared_memory import free_segments, segments_of
from tests.fakes.running import eventually

# A process that has a segment mapped, with nobody to clean up after it, as after a kill of all of vLLM.
OWNER = """
import mmap, sys
file = open(sys.argv[1], "w+b")
file.truncate(4096)
kept = mmap.mmap(file.fileno(), 4096)
print("mapped", flush=True)
sys.stdin.read()
"""


async def test_killed_session_leaves_no_segment(tmp_path: Path) -> None:
    """What a killed process had mapped is gone; what others have is not, nor what was only nearby."""
    shared, own = Path("/dev/shm", f"{tmp_path.name}-shared"), Path("/dev/shm", f"{tmp_path.name}-own")
    ours = SharedMemory(create=True, size=4096)
    command = [sys.executable, "-c", OWNER]
    try:
        with (
            subprocess.Popen(
                [*command, str(own)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
            ) as doomed,
            subprocess.Popen([*command, str(shared)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as bystander,
        ):
            for each in (doomed, bystander):
                assert each.stdout
                await asyncio.to_thread(each.stdout.readline)
            assert segments_of([doomed.pid]) == {own}
            assert free_segments({own, shared}) == []
            await kill_session(doomed.pid)
            assert not own.exists()
            assert shared.exists()
            bystander.communicate()
        await eventually(lambda: free_segments({shared}) == [shared])
        assert Path("/dev/shm", ours.name).exists()
    finally:
        ours.close()
        ours.unlink()
        shared.unlink(missing_ok=True)
