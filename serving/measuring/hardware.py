"""What this machine computes with: its processor and cores, or its GPUs, which `nvidia-smi` names."""

import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

from config.capacity import Hardware
from config.schema import ReplicaSettings
from serving.replica import Launch

SMI_SECONDS = 20


def processor_name(cpuinfo: str) -> str | None:
    """Find the processor's name in /proc/cpuinfo; ARM has none there, but a part number."""
    facts: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    if name := facts.get("model name") or facts.get("Model"):
        return " ".join(name.split())
    implementer, part = facts.get("CPU implementer"), facts.get("CPU part")
    return f"ARM {implementer} part {part}" if implementer and part else None


def bound_cores(cores: str | None, available: int) -> int:
    """Count the cores of `0-3,8|4-7`; what names none (`auto`, `nobind`, nothing) means all that are available."""
    if cores is None or not any(letter.isdigit() for letter in cores):
        return available
    chosen: set[int] = set()
    for part in cores.replace("|", ",").split(","):
        first, _, last = part.partition("-")
        if first.isdigit():
            chosen.update(range(int(first), int(last or first) + 1))
    return len(chosen) or available


def launch_hardware(launch: Launch) -> Hardware:
    """Say what a replica started here computes with."""
    if launch.engine == "cuda":
        return _gpu_hardware(smi_column("name"), used_gpus(launch))
    return _cpu_hardware(launch.settings.cores)


def local_hardware(settings: ReplicaSettings) -> Hardware:
    """Guess what a replica that somebody else started here computes with: GPUs if there are any."""
    names = smi_column("name")
    return _gpu_hardware(names, _gpus(settings)) if names else _cpu_hardware(settings.cores)


def _gpu_hardware(names: Sequence[str], used: Sequence[int]) -> Hardware:
    name = names[used[0]] if used[0] < len(names) else "unknown GPU"
    return Hardware(device=name, count=len(used), unit="GPU")


def _cpu_hardware(cores: str | None) -> Hardware:
    name = processor_name(Path("/proc/cpuinfo").read_text(errors="replace")) or platform.machine()
    return Hardware(device=name, count=bound_cores(cores, len(os.sched_getaffinity(0))), unit="core")


def used_gpus(launch: Launch) -> tuple[int, ...]:
    """Name the GPUs that a launch computes on; without a choice vLLM takes the first ones."""
    return launch.gpus or _gpus(launch.settings) if launch.engine == "cuda" else ()


def _gpus(settings: ReplicaSettings) -> tuple[int, ...]:
    return settings.gpus[: settings.ranks] or tuple(range(settings.ranks))


def smi_column(column: str) -> list[str]:
    """Ask nvidia-smi for one fact of every GPU; nothing where there is none."""
    argv = ["nvidia-smi", f"--query-gpu={column}", "--format=csv,noheader"]
    try:
        told = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=SMI_SECONDS).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in told.splitlines() if line.strip()]
