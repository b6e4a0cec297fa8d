"""The facts that the doctor checks."""

from dataclasses import dataclass

from config.hardware import Core, Gpu, Processor
from config.memory import Memory


@dataclass(frozen=True, slots=True)
class Software:
    """Installed software, from package metadata alone; None if it is not installed."""

    python: str
    engine: str | None
    engine_version: str | None
    engine_command: str
    torch: str | None
    torchvision: str | None
    plugin: bool  # whether vLLM will load quantgate's plugin


@dataclass(frozen=True, slots=True)
class Hardware:
    """Hardware of this machine."""

    processor: Processor
    cores: tuple[Core, ...]
    memory: Memory
    gpus: tuple[Gpu, ...]
    allocator: str | None


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of the operating system."""

    open_files: int
    open_files_most: int
    shared_memory_bytes: int
    home: str
    home_free_bytes: int
    home_writable: bool


@dataclass(frozen=True, slots=True)
class Configured:
    """What a configuration needs of this machine: addresses, and why replicas cannot start.

    `addresses` are name, address and whether it is in use. `without_tools` describes replicas for which no tool parser
    is known.
    """

    file: str
    replicas: tuple[str, ...]
    addresses: tuple[tuple[str, str, bool], ...] = ()
    unservable: tuple[tuple[str, str], ...] = ()
    oversubscribed: tuple[str, ...] = ()
    without_tools: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Checkup:
    """All of it; `clock_behind` where the clock is earlier than the files of this installation."""

    software: Software
    hardware: Hardware
    limits: Limits
    no_bytecode: bool
    clock: str
    clock_behind: bool
    configured: Configured | None = None
