"""The one reader of this machine's cores, processor, GPUs and allocators; config.memory reads its memory."""

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
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
class Core:
    """A physical core: its NUMA node, and those of its logical CPUs that this process may use."""

    node: int
    cpus: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Processor:
    """The processor's name, instruction-set flags (x86, ARM) and architecture."""

    name: str
    flags: frozenset[str]
    architecture: str


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU; `index` is its number in nvidia-smi."""

    index: int
    name: str
    total_bytes: int
    free_bytes: int
    driver: str


def read_cores(system: Path = Path("/sys/devices/system")) -> tuple[Core, ...]:
    """Return the physical cores that this process may use; each logical CPU is one where the kernel has no topology."""
    allowed = os.sched_getaffinity(0)
    nodes = {cpu: node for node, cpus in _nodes(system) for cpu in cpus}
    cores: dict[frozenset[int], Core] = {}
    for cpu in sorted(allowed):
        threads = frozenset(parse_cpus(_text(system / f"cpu/cpu{cpu}/topology/thread_siblings_list"))) or {cpu}
        own = tuple(sorted(allowed & threads)) or (cpu,)
        cores.setdefault(frozenset(own), Core(nodes.get(cpu, 0), own))
    return tuple(cores.values())


def read_processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> Processor:
    """Return the processor of this machine."""
    fields: dict[str, str] = {}
    for line in _text(cpuinfo).splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), " ".join(value.split()))
    architecture = platform.machine()
    flags = frozenset((fields.get("flags") or fields.get("Features") or "").split())
    return Processor(_processor_name(fields) or architecture, flags, architecture)


def read_gpus() -> tuple[Gpu, ...]:
    """Return the GPUs from NVML if its binding is installed, else from nvidia-smi; empty without either."""
    try:
        import pynvml  # noqa: PLC0415 - comes with vLLM for CUDA only
    except ImportError:
        return parse_nvidia_smi(_nvidia_smi())
    return tuple(_from_nvml(pynvml))


def has_gpu_driver() -> bool:
    """Whether an NVIDIA driver is installed; cheap, and needs neither NVML nor a free GPU."""
    return _NVIDIA_DRIVER.exists() or shutil.which("nvidia-smi") is not None


def parse_nvidia_smi(table: str) -> tuple[Gpu, ...]:
    """Parse nvidia-smi's rows `index, name, total MiB, free MiB, driver`; other rows are ignored."""
    rows = [[cell.strip() for cell in line.split(",")] for line in table.splitlines()]
    return tuple(
        Gpu(int(row[0]), row[1], int(row[2]) * 2**20, int(row[3]) * 2**20, row[4])
        for row in rows
        if len(row) == 5 and all(row[column].isdecimal() for column in (0, 2, 3))
    )


def find_allocator() -> Path | None:
    """Return an installed allocator that vLLM recommends to preload on a CPU: tcmalloc, else jemalloc."""
    for pattern in _ALLOCATORS:
        for folder in _LIBRARY_FOLDERS:
            libraries = sorted(Path(folder).glob(pattern))
            if libraries:
                return libraries[0]
    return None


def parse_cpus(text: str) -> list[int]:
    """Parse a CPU list of the kernel: `0-3,8`."""
    numbers: list[int] = []
    for first, last in re.findall(r"(\d+)(?:-(\d+))?", text):
        numbers.extend(range(int(first), int(last or first) + 1))
    return numbers


def _processor_name(cpuinfo: Mapping[str, str]) -> str | None:
    """ARM has a part number instead of a name."""
    if name := cpuinfo.get("model name") or cpuinfo.get("Model"):
        return name
    implementer, part = cpuinfo.get("CPU implementer"), cpuinfo.get("CPU part")
    return f"ARM {implementer} part {part}" if implementer and part else None


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
