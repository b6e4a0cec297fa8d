"""How much memory quantizing takes, and how much there is."""

import os
from dataclasses import dataclass

from config.hardware import read_gpus
from config.manifest import Engine
from config.memory import read_memory
from quantize.base import BaseModel


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
    free_bytes = tuple(gpu.free_bytes for gpu in read_gpus())
    return Machine(len(os.sched_getaffinity(0)), memory.free_bytes, memory.total_bytes, free_bytes)


def widest_inputs(base: BaseModel) -> int:
    """Inputs of the widest linear layer: its Hessian has that many rows, and wants as many tokens."""
    return max((columns for _, columns in base.shapes.values()), default=0)
