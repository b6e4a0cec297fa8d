"""The hardware that a replica computes on: processor cores, or GPUs."""

import os
from collections.abc import Sequence

from config.capacity import Hardware
from config.hardware import Gpu, parse_cpus, read_gpus, read_processor
from config.schema import ReplicaSettings
from serving.replica import Launch


def bound_cores(cores: str | None, available: int) -> int:
    """Count the CPUs of a binding such as `0-3,8|4-7`; without numbers (`auto`, `nobind`, None) all available ones."""
    return len(set(parse_cpus(cores or ""))) or available


def launch_hardware(launch: Launch) -> Hardware:
    """Return what a replica started by quantgate computes on."""
    if launch.engine == "cuda":
        return _gpu_hardware(read_gpus(), used_gpus(launch))
    return _cpu_hardware(launch.settings.cores)


def local_hardware(settings: ReplicaSettings) -> Hardware:
    """Return what an external replica on this machine computes on, by assumption: the GPUs, if it has any."""
    gpus = read_gpus()
    return _gpu_hardware(gpus, _gpu_indices(settings)) if gpus else _cpu_hardware(settings.cores)


def used_gpus(launch: Launch) -> tuple[int, ...]:
    """Return the indices of the GPUs of a launch; without a configuration vLLM takes the first ones."""
    return launch.gpus or _gpu_indices(launch.settings) if launch.engine == "cuda" else ()


def used_gpu_bytes(gpus: Sequence[int]) -> int | None:
    """Add up the memory in use on some GPUs, by any process; None if it is unknown."""
    used = [gpu.total_bytes - gpu.free_bytes for gpu in read_gpus() if gpu.index in gpus]
    return sum(used) if used else None


def _gpu_hardware(gpus: Sequence[Gpu], used: Sequence[int]) -> Hardware:
    names = {gpu.index: gpu.name for gpu in gpus}
    return Hardware(device=names.get(used[0], "unknown GPU"), count=len(used), unit="GPU")


def _cpu_hardware(cores: str | None) -> Hardware:
    count = bound_cores(cores, len(os.sched_getaffinity(0)))
    return Hardware(device=read_processor().name, count=count, unit="core")


def _gpu_indices(settings: ReplicaSettings) -> tuple[int, ...]:
    return settings.gpus[: settings.ranks] or tuple(range(settings.ranks))
