"""How much memory quantizing takes, and how much there is."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from config.manifest import Engine
from quantize.base import BaseModel

_NVIDIA_SMI = ("nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits")
_NVIDIA_SMI_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Machine:
    """What this machine has: memory in bytes, available now and in total, and free on each GPU by its number."""

    cores: int
    memory_bytes: int
    total_bytes: int
    gpu_bytes: tuple[int, ...] = ()

    @property
    def engine(self) -> Engine:
        """What work runs on here."""
        return "cuda" if self.gpu_bytes else "cpu"


def present_machine() -> Machine:
    """Look at this machine, without importing torch."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Machine(len(os.sched_getaffinity(0)), available_bytes(), total, free_gpu_bytes())


def free_gpu_bytes() -> tuple[int, ...]:
    """Ask `nvidia-smi` for the free memory of every GPU; nothing where there is none."""
    try:
        run = subprocess.run(_NVIDIA_SMI, capture_output=True, text=True, check=False, timeout=_NVIDIA_SMI_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return tuple(int(line) * 2**20 for line in run.stdout.split() if line.isdecimal()) if run.returncode == 0 else ()


def widest_inputs(base: BaseModel) -> int:
    """Inputs of the widest linear layer: its Hessian has that many rows, and wants as many tokens."""
    return max((columns for _, columns in base.shapes.values()), default=0)


def available_bytes(root: Path = Path("/")) -> int:
    """Read how much memory a new process may take: the machine's, or what the container is allowed if that is less."""
    meminfo = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines() if ":" in line)
    machine = int(meminfo["MemAvailable"].split()[0]) * 1024
    return min([machine, *_container_bytes(root / "sys/fs/cgroup")])


def _container_bytes(group: Path) -> list[int]:
    """Read what is left of a container's limit, if it has one (cgroup v2); the page cache in it can be given back."""
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        cache = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:
        return []
    return [int(limit) - used + int(cache.get("inactive_file", 0))] if limit.isdigit() else []
