"""A supervisor over fake replicas, for tests: launches, a machine whose vLLM is the fake, and waiting for states."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from config.schema import ReplicaSettings
from config.variant import PARENT_QUALITY, Variant
from serving.backoff import Backoff
from serving.command import Machine
from serving.probe import Probe
from serving.process_ledger import ProcessLedger
from serving.registry import Registry
from serving.replica import Launch, ReplicaStatus, State
from serving.supervisor import Supervisor
from tests.bytecode import share_bytecode

DEADLINE_SECONDS = 30.0
QUICK = Backoff(first_seconds=0.01, longest_seconds=0.05)
# A replica that fails stays failed for the rest of a test.
SLOW = Backoff(first_seconds=600, longest_seconds=600)


def model_directory(folder: Path, **config: object) -> Path:
    """A directory that looks like a model to everything that doesn't load it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"architectures": ["Llama"], "dtype": "bfloat16", **config}))
    return folder


def launch(folder: Path, name: str = "int4", *args: str, **settings: object) -> Launch:
    """One fake replica of a variant."""
    variant = Variant(name, name, PARENT_QUALITY, model_directory(folder / name))
    replica = ReplicaSettings.model_validate({"variant": name, "args": args, "drain_seconds": 5, **settings})
    return Launch(f"{name}-1", variant, "cpu", replica, port=replica.port)


def fake_machine(folder: Path) -> Machine:
    """This machine, with the fake in vLLM's context."""
    share_bytecode(folder)
    return Machine(sys.executable, folder, 2, dict(os.environ), ("-m", "tests.fakes.vllm"))


@asynccontextmanager
async def supervised(folder: Path, *launches: Launch, backoff: Backoff = QUICK) -> AsyncIterator[Registry]:
    """Run launches under a supervisor."""
    async with supervising(folder, *launches, backoff=backoff) as supervisor:
        yield supervisor.registry


@asynccontextmanager
async def supervising(folder: Path, *launches: Launch, **options: Any) -> AsyncIterator[Supervisor]:
    """A supervisor at work, with options of its own."""
    async with Probe() as probe:
        settings = {"backoff": QUICK, "log_folder": folder / "logs", **options}
        ledger = ProcessLedger(folder / "running")
        async with Supervisor(launches, Registry(), fake_machine(folder), probe, ledger, **settings) as supervisor:
            yield supervisor


async def until(
    registry: Registry, condition: Callable[[ReplicaStatus], bool], replica: str = "int4-1"
) -> ReplicaStatus:
    """Wait until a replica is as it should be."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not condition(status := registry.status(replica)):
            await registry.changed()
    return status


async def ready(registry: Registry, replica: str = "int4-1") -> ReplicaStatus:
    """Wait until a replica is ready."""
    return await until(registry, lambda status: status.state is State.READY, replica)


def noted_session(folder: Path) -> int:
    """The session of the one replica that runs."""
    (session,) = noted_sessions(folder)
    return session


def noted_sessions(folder: Path) -> set[int]:
    """The sessions of all replicas that run."""
    return {int(record.stem) for record in (folder / "running").glob("*.json")}
