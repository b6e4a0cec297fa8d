"""How much memory quantizing takes, and how much there is."""

import os
import subprocess
from dataclasses import dataclass

from config.manifest import Engine
from config.memory import read_memory
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
    memory = read_memory()
    return Machine(len(os.sched_getaffinity(0)), memory.free_bytes, memory.total_bytes, free_gpu_bytes())


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
