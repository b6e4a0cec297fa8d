"""The server that is measured: one started for the measurement, or one that runs already."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from serving.command import Machine
from serving.measuring.target import BenchmarkTarget
from serving.preflight import check_placement, check_servable
from serving.probe import Probe
from serving.process import Child
from serving.process_ledger import ProcessLedger
from serving.registry import Registry
from serving.replica import Launch, Replica
from serving.replica_lifecycle import LaunchContext, start_replica


@dataclass(frozen=True, slots=True)
class BenchmarkContext:
    """The machine, and the folder for logs and process records."""

    machine: Machine
    home: Path


@asynccontextmanager
async def measured_server(
    target: BenchmarkTarget, context: BenchmarkContext, probe: Probe, log: Callable[[str], None]
) -> AsyncIterator[tuple[Replica, Child | None]]:
    """A verified server, and its process if it was started here; that has ended, whole, after the block."""
    if target.launch is not None:
        async with _started(target.launch, context, probe, log) as (child, replica):
            yield replica, child
        return
    assert target.replica is not None
    served = await probe.served_model(target.replica)
    # Of what it serves, only the directory's name can be compared.
    if Path(served.root).name != target.directory.name:
        where = f"{target.replica.url} serves {served.name} from {served.root}"
        log(f"{where}: its figures are kept as those of {target.directory}")
    replica = replace(target.replica, served_name=served.name, max_model_len_tokens=served.max_model_len_tokens)
    await probe.generate_one_token(replica)
    yield replica, None


@asynccontextmanager
async def _started(
    launch: Launch, context: BenchmarkContext, probe: Probe, log: Callable[[str], None]
) -> AsyncIterator[tuple[Child, Replica]]:
    """Start it as a supervisor does, under an id that no supervisor has: the next one stops what is left of it."""
    launch = replace(launch, replica_id=f"measure-{launch.replica_id}")
    check_servable(launch)
    check_placement([launch])
    ledger, logs = ProcessLedger(context.home / "running"), context.home / "logs"
    log(f"starting vLLM (log: {logs / launch.replica_id}.log)")
    launch_context = LaunchContext(Registry(), context.machine, probe, ledger, logs, asyncio.Semaphore(1))
    async with start_replica(launch, launch_context) as (child, replica):
        yield child, replica
