"""The server that is measured: one of ours for as long as the block lasts, or one that runs already."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from serving.command import Machine
from serving.life import Birthplace, started
from serving.measuring.subject import Subject
from serving.notebook import Notebook
from serving.preflight import refuse_fleet, refuse_hopeless
from serving.probe import Probe
from serving.process import Child
from serving.registry import Registry
from serving.replica import Launch, Replica

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Server:
    """Where requests go; `child` is the process if it is ours."""

    replica: Replica
    child: Child | None


@dataclass(frozen=True, slots=True)
class Place:
    """Where servers are started: the machine, and the folder that keeps logs and notes."""

    machine: Machine
    home: Path


@asynccontextmanager
async def measured_server(subject: Subject, place: Place, probe: Probe, tell: Tell) -> AsyncIterator[Server]:
    """A verified server of a subject; one that was started here is gone, whole, after the block."""
    if subject.launch is not None:
        async with _started(subject.launch, place, probe, tell) as server:
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
async def _started(launch: Launch, place: Place, probe: Probe, tell: Tell) -> AsyncIterator[Server]:
    """Start it the way a supervisor does, under a name that no supervisor wants: the next one ends what we leave."""
    launch = dataclasses.replace(launch, replica_id=f"measure-{launch.replica_id}")
    refuse_hopeless(launch)
    refuse_fleet([launch])
    notebook, logs = Notebook(place.home / "running"), place.home / "logs"
    tell(f"starting vLLM (log: {logs / launch.replica_id}.log)")
    birthplace = Birthplace(Registry(), place.machine, probe, notebook, logs, asyncio.Semaphore(1))
    async with started(launch, birthplace) as (child, replica):
        yield Server(replica, child)


def death(child: Child) -> str:
    """Say how a server ended."""
    return f"vLLM ended with exit code {child.exit_code}: {child.last_words()} (log: {child.log})"
