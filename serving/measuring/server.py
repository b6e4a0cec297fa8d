"""The server that is measured: one of ours for as long as the block lasts, or one that runs already."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
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

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Server:
    """Where requests go; `child` is the process if it is ours."""

    replica: Replica
    child: Child | None


@dataclass(frozen=True, slots=True)
class BenchmarkContext:
    """Where servers are started: the machine, and the folder that keeps logs and records."""

    machine: Machine
    home: Path


@asynccontextmanager
async def measured_server(
    subject: BenchmarkTarget, context: BenchmarkContext, probe: Probe, tell: Tell
) -> AsyncIterator[Server]:
    """A verified server of a subject; one that was started here is gone, whole, after the block."""
    if subject.launch is not None:
        async with _started(subject.launch, context, probe, tell) as server:
            yield server
        return
    assert subject.replica is not None
    replica = await _named(subject.replica, subject.directory, probe, tell)
    await probe.generate_one_token(replica)
    yield Server(replica, None)


async def _named(replica: Replica, directory: Path, probe: Probe, tell: Tell) -> Replica:
    """Ask a running replica for its name and length; what it serves can only be compared by the directory's name."""
    served = await probe.served_model(replica)
    if Path(served.root).name != directory.name:
        tell(f"{replica.url} serves {served.name} from {served.root}: its figures are kept as those of {directory}")
    return dataclasses.replace(replica, served_name=served.name, max_model_len_tokens=served.max_model_len_tokens)


@asynccontextmanager
async def _started(launch: Launch, context: BenchmarkContext, probe: Probe, tell: Tell) -> AsyncIterator[Server]:
    """Start it the way a supervisor does, under a name that no supervisor wants: the next one ends what we leave."""
    launch = dataclasses.replace(launch, replica_id=f"measure-{launch.replica_id}")
    check_servable(launch)
    check_placement([launch])
    ledger, logs = ProcessLedger(context.home / "running"), context.home / "logs"
    tell(f"starting vLLM (log: {logs / launch.replica_id}.log)")
    launch_context = LaunchContext(Registry(), context.machine, probe, ledger, logs, asyncio.Semaphore(1))
    async with start_replica(launch, launch_context) as (child, replica):
        yield Server(replica, child)


def death(child: Child) -> str:
    """Say how a server ended."""
    return f"vLLM ended with exit code {child.exit_code}: {child.last_words()} (log: {child.log})"
