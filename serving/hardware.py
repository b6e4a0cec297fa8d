"""Reads what this machine has: cores, GPUs, libraries (memory: config.memory). Values in, no judgement."""

import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving.cores import Core

_NVIDIA_SMI = (
    "nvidia-smi",
    "--query-gpu=index,name,memory.total,memory.free,driver_version",
    "--format=csv,noheader,nounits",
)
_NVIDIA_SMI_SECONDS = 20.0
_ALLOCATORS = ("libtcmalloc_minimal.so*", "libtcmalloc.so*", "libjemalloc.so*")
_LIBRARY_FOLDERS = (
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/usr/lib64",
    "/usr/lib",
    "/usr/local/lib",
)


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU as nvidia-smi numbers it."""

    index: int
    name: str
    total_bytes: int
    free_bytes: int
    driver: str


def read_cores(system: Path = Path("/sys/devices/system")) -> tuple[Core, ...]:
    """List the physical cores that this process may use, each with its threads and NUMA node."""
    allowed = os.sched_getaffinity(0)
    nodes = {cpu: node for node, cpus in _nodes(system) for cpu in cpus}
    cores: dict[frozenset[int], Core] = {}
    for cpu in sorted(allowed):
        threads = frozenset(parse_cpus(_text(system / f"cpu/cpu{cpu}/topology/thread_siblings_list"))) or {cpu}
        own = tuple(sorted(allowed & threads)) or (cpu,)
        cores.setdefault(frozenset(own), Core(nodes.get(cpu, 0), own))
    return tuple(cores.values())


def read_gpus() -> tuple[Gpu, ...]:
    """Ask NVML where its binding is installed, nvidia-smi otherwise; empty where there is neither."""
    try:
        import pynvml  # noqa: PLC0415 - comes with vLLM for CUDA only
    except ImportError:
        return parse_nvidia_smi(_nvidia_smi())
    return tuple(_from_nvml(pynvml))


def parse_nvidia_smi(table: str) -> tuple[Gpu, ...]:
    """Read nvidia-smi's rows `index, name, total MiB, free MiB, driver`; others are left out."""
    rows = [[cell.strip() for cell in line.split(",")] for line in table.splitlines()]
    return tuple(
        Gpu(int(row[0]), row[1], int(row[2]) * 2**20, int(row[3]) * 2**20, row[4])
        for row in rows
        if len(row) == 5 and all(row[place].isdecimal() for place in (0, 2, 3))
    )


def find_allocator() -> Path | None:
    """The allocator that vLLM recommends to preload on CPU, where the machine has one."""
    for pattern in _ALLOCATORS:
        for folder in _LIBRARY_FOLDERS:
            found = sorted(Path(folder).glob(pattern))
            if found:
                return found[0]
    return None


def parse_cpus(text: str) -> list[int]:
    """Read the kernel's way to write a set of CPUs: `0-3,8`."""
    numbers: list[int] = []
    for first, last in re.findall(r"(\d+)(?:-(\d+))?", text):
        numbers.extend(range(int(first), int(last or first) + 1))
    return numbers


def _nodes(system: Path) -> Iterator[tuple[int, list[int]]]:
    for folder in sorted((system / "node").glob("node[0-9]*")):
        yield int(folder.name.removeprefix("node")), parse_cpus(_text(folder / "cpulist"))


def _from_nvml(library: Any) -> Iterator[Gpu]:
    try:
        library.nvmlInit()
    except library.NVMLError:
        return
    try:
        driver = str(library.nvmlSystemGetDriverVersion())
        for index in range(library.nvmlDeviceGetCount()):
            device = library.nvmlDeviceGetHandleByIndex(index)
            memory = library.nvmlDeviceGetMemoryInfo(device)
            yield Gpu(index, str(library.nvmlDeviceGetName(device)), int(memory.total), int(memory.free), driver)
    finally:
        library.nvmlShutdown()


def _nvidia_smi() -> str:
    try:
        done = subprocess.run(_NVIDIA_SMI, capture_output=True, text=True, timeout=_NVIDIA_SMI_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
