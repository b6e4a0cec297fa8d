"""How much memory a server of ours takes, looked at now and then; GPUs by `nvidia-smi`."""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from serving.measuring.hardware import smi_column
from serving.process import session_processes

MEBIBYTE, KIBIBYTE = 2**20, 2**10


@dataclass(slots=True)
class MemoryWatch:
    """The most that a session of processes, and what is on its GPUs, was seen to take; None: nothing was seen."""

    session: int | None
    gpus: tuple[int, ...] = ()
    host_bytes: int | None = None
    gpu_bytes: int | None = None

    def look(self) -> None:
        """Look now; of somebody else's server nothing is known."""
        if self.session is None:
            return
        self.host_bytes = max(session_memory_bytes(self.session), self.host_bytes or 0) or None
        if self.gpus:
            self.gpu_bytes = max(gpu_memory_bytes(self.gpus) or 0, self.gpu_bytes or 0) or None


def session_memory_bytes(session: int) -> int:
    """Add up the memory of a session's processes; pages that several share count once."""
    return sum(map(_process_bytes, session_processes(session)))


def proportional_bytes(rollup: str) -> int | None:
    """Read the proportional set size out of /proc/PID/smaps_rollup."""
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


def gpu_memory_bytes(gpus: Sequence[int]) -> int | None:
    """Add up what is used on some GPUs, by whomever; None where nobody tells."""
    used = [column.split()[0] for column in smi_column("memory.used")]
    told = [int(used[gpu]) * MEBIBYTE for gpu in gpus if gpu < len(used) and used[gpu].isdigit()]
    return sum(told) if told else None
