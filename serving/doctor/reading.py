"""Reads the facts that the doctor judges; starts nothing and imports neither torch nor vLLM."""

import os
import platform
import resource
import shutil
import socket
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from config.errors import SettingsError
from config.hardware import find_allocator, read_cores, read_gpus, read_processor
from config.load import load_settings_file
from config.memory import read_memory
from config.schema import Settings
from serving.doctor.facts import Checkup, Configured, Hardware, Limits, Software
from serving.errors import LaunchRefused
from serving.machine import (
    engine_distribution,
    installed_engine,
    installed_tool_parsers,
    installed_version,
    vllm_program,
)
from serving.preflight import check_placement, check_servable
from serving.replica import Launch, plan_launches
from serving.templates.tool_calling import with_tool_calling, without_tools
from serving.validation import read_named_files

_PLUGINS = "vllm.general_plugins"


def examine(home: Path, environment: Mapping[str, str], config: Path | None = None) -> Checkup:
    """Look at everything; ConfigError if the configuration can't be read."""
    now = time.time()
    installed = Path(__file__).stat().st_mtime
    return Checkup(
        software=_software(environment),
        hardware=_hardware(),
        limits=_limits(home),
        no_bytecode=bool(environment.get("PYTHONDONTWRITEBYTECODE")),
        clock=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now)),
        clock_behind=now < installed,
        configured=_configured(config) if config else None,
    )


def _software(environment: Mapping[str, str]) -> Software:
    engine = engine_distribution()
    chosen = environment.get("VLLM_PLUGINS")
    found = any(point.name == "quantgate" for point in metadata.entry_points(group=_PLUGINS))
    program = vllm_program()
    return Software(
        python=f"{platform.python_version()} at {sys.executable}",
        engine=engine,
        engine_version=installed_version(engine) if engine else None,
        engine_command="vllm serve" if program[-1] == "serve" else f"python {' '.join(program)}",
        torch=installed_version("torch"),
        torchvision=installed_version("torchvision"),
        plugin=found and (chosen is None or "quantgate" in chosen.split(",")),
    )


def _hardware() -> Hardware:
    allocator = find_allocator()
    return Hardware(
        processor=read_processor(),
        cores=read_cores(),
        memory=read_memory(),
        gpus=read_gpus(),
        allocator=str(allocator) if allocator else None,
    )


def _limits(home: Path) -> Limits:
    soft, hard = (_most(value) for value in resource.getrlimit(resource.RLIMIT_NOFILE))
    shared = Path("/dev/shm")  # noqa: S108 - its size is what vLLM's processes have to talk through
    standing = next(folder for folder in (home, *home.parents) if folder.exists())
    return Limits(
        open_files=soft,
        open_files_most=hard,
        shared_memory_bytes=shutil.disk_usage(shared).free if shared.exists() else 0,
        home=str(home),
        home_free_bytes=shutil.disk_usage(standing).free,
        home_writable=os.access(standing, os.W_OK),
    )


def _most(limit: int) -> int:
    return sys.maxsize if limit == resource.RLIM_INFINITY else limit


def _configured(path: Path) -> Configured:
    file = load_settings_file(path)
    settings, named = file.settings, read_named_files(file, path.absolute().parent)
    if named.problems:
        raise SettingsError(list(named.problems))
    try:
        launches = plan_launches(settings.replicas, dict(named.variants), installed_engine())
    except LaunchRefused:
        launches = ()  # no engine, which is a finding of its own
    unservable = tuple((launch.replica_id, reason) for launch in launches if (reason := _unservable(launch)))
    sound = [launch for launch in launches if launch.replica_id not in dict(unservable)]
    replicas = tuple(launch.replica_id for launch in launches)
    tools = without_tools(with_tool_calling(sound, installed_tool_parsers()))
    return Configured(str(path), replicas, _addresses(settings), unservable, _oversubscribed(sound), tools)


def _unservable(launch: Launch) -> str | None:
    try:
        check_servable(launch)
    except LaunchRefused as refusal:
        return str(refusal).removeprefix(f"{launch.replica_id}: ")
    return None


def _oversubscribed(launches: list[Launch]) -> tuple[str, ...]:
    try:
        check_placement(launches)
    except LaunchRefused as refusal:
        return tuple(str(refusal).splitlines())
    return ()


def _addresses(settings: Settings) -> tuple[tuple[str, str, bool], ...]:
    gateway = settings.gateway
    wanted = (("gateway.listen", gateway.listen), ("gateway.admin", gateway.admin))
    return tuple((name, address, _taken(address)) for name, address in wanted)


def _taken(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        ((family, kind, _, _, where), *_) = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
    except OSError:
        return True
    return False
