"""Reads what this machine has: cores, memory, GPUs, libraries. Values in, no judgement."""

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
_UNLIMITED_BYTES = 1 << 62  # cgroup v1 writes a huge number where v2 writes "max"
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


@dataclass(frozen=True, slots=True)
class Memory:
    """Main memory: what there is, and what could be taken now without pushing anything out."""

    total_bytes: int
    free_bytes: int


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


def read_memory(root: Path = Path("/")) -> Memory:
    """Main memory of this machine, or of the container's share of it."""
    told = dict(re.findall(r"^(\w+):\s+(\d+) kB", _text(root / "proc/meminfo"), re.MULTILINE))
    total, free = int(told.get("MemTotal", 0)) * 1024, int(told.get("MemAvailable", 0)) * 1024
    for limit, usage, statistics in _cgroup_files(root):
        most, used = _number(limit), _number(usage)
        if most is not None and used is not None and most < _UNLIMITED_BYTES:
            # The page cache counts as used there, but gives way.
            cached = re.search(r"^(?:total_)?inactive_file (\d+)", _text(statistics), re.MULTILINE)
            left = most - used + (int(cached[1]) if cached else 0)
            total, free = min(total, most), max(0, min(free, left))
    return Memory(total, free)


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


def _cgroup_files(root: Path) -> Iterator[tuple[Path, Path, Path]]:
    """Limit, usage and statistics of every group that this process is in, outermost first: version 2, then 1."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        version_2 = number == "0" and not controllers
        if not version_2 and "memory" not in controllers.split(","):
            continue
        folder = root / "sys/fs/cgroup" / ("" if version_2 else "memory")
        names = ("memory.max", "memory.current") if version_2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        for part in ("", *path.strip("/").split("/")):
            folder = folder / part
            yield folder / names[0], folder / names[1], folder / "memory.stat"


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


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None
