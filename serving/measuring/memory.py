"""Peak memory of a server process and of its GPUs, by sampling."""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from serving.measuring.hardware import used_gpu_bytes
from serving.process import session_processes

KIBIBYTE = 2**10


@dataclass(slots=True)
class PeakMemory:
    """The largest samples of a session of processes and of its GPUs; None if there was none."""

    session: int | None
    gpus: tuple[int, ...] = ()
    host_bytes: int | None = None
    gpu_bytes: int | None = None

    def sample(self) -> None:
        """Take a sample; none of an external server, which has no session here."""
        if self.session is None:
            return
        self.host_bytes = max(session_memory_bytes(self.session), self.host_bytes or 0) or None
        if self.gpus:
            self.gpu_bytes = max(used_gpu_bytes(self.gpus) or 0, self.gpu_bytes or 0) or None


def session_memory_bytes(session: int) -> int:
    """Add up the memory of a session's processes; shared pages count once."""
    return sum(map(_process_bytes, session_processes(session)))


def proportional_bytes(rollup: str) -> int | None:
    """Parse the proportional set size in the text of /proc/PID/smaps_rollup."""
    sizes = [line.split()[1] for line in rollup.splitlines() if line.startswith("Pss:")]
    return int(sizes[0]) * KIBIBYTE if sizes else None


def _process_bytes(pid: int) -> int:
    with suppress(OSError):
        size = proportional_bytes(Path(f"/proc/{pid}/smaps_rollup").read_text())
        if size is not None:
            return size
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0
