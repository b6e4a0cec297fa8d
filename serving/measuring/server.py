"""The server that is measured: one of ours for as long as the block lasts, or one that runs already."""

import asyncio
import dataclasses
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from serving.command import Machine, build_command
from serving.errors import LaunchRefused, StartFailed
from serving.machine import free_port, port_is_free
from serving.measuring.subject import Subject
from serving.notebook import Notebook
from serving.preflight import refuse_altered, refuse_hopeless
from serving.probe import Probe
from serving.process import Child
from serving.replica import Launch, Replica

READY_POLL_SECONDS = 0.2
PATIENCE_SECONDS = 15.0  # an idle vLLM takes 4-6 s to leave
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
    refuse_hopeless(launch)
    if launch.port is not None and not port_is_free(launch.port):
        raise LaunchRefused(f"{launch.replica_id}: port {launch.port} is in use; stop its owner or choose another")
    await _require_seal(launch, place)
    port = launch.port or free_port()
    log = place.home / "logs" / f"measure-{launch.replica_id}.log"
    tell(f"starting vLLM (log: {log})")
    async with Child(build_command(launch, port, place.machine), log) as child:
        # The note lets the next supervisor end this server, should we be killed: it is no launch that anybody wants.
        with Notebook(place.home / "running").running(launch.replica_id, "measured", port, child.pid):
            child.release()
            replica = await _ready(launch, child, f"http://127.0.0.1:{port}", probe)
            child.patience_seconds = PATIENCE_SECONDS
            yield Server(replica, child)


async def _require_seal(launch: Launch, place: Place) -> None:
    """Hold the files against their manifest, in a thread: the first time that is every byte of them."""
    stopped = threading.Event()
    try:
        await asyncio.to_thread(refuse_altered, launch, place.machine.cache_directory / "seals", stopped.is_set)
    finally:
        stopped.set()


async def _ready(launch: Launch, child: Child, url: str, probe: Probe) -> Replica:
    limit_seconds = launch.settings.start_timeout_seconds
    try:
        async with asyncio.timeout(limit_seconds):
            while not await probe.healthy(url):
                if child.exit_code is not None:
                    raise StartFailed(f"{launch.replica_id}: {death(child)}")
                await asyncio.sleep(READY_POLL_SECONDS)
    except TimeoutError:
        why = f"not ready after {limit_seconds:g} s: {child.last_words()}"
        raise StartFailed(f"{launch.replica_id}: {why} (log: {child.log})") from None
    key = launch.settings.api_key.get_secret_value() if launch.settings.api_key else None
    variant = launch.variant
    replica = Replica(launch.replica_id, variant.name, variant.precision, url, launch.replica_id, key)
    served = await probe.served_model(replica)
    if served.name != launch.replica_id:
        raise StartFailed(f"{launch.replica_id}: {url} serves {served.name}, not what was started")
    await probe.generate_one_token(replica)
    return dataclasses.replace(replica, max_model_len_tokens=served.max_model_len_tokens)


def death(child: Child) -> str:
    """Say how a server ended."""
    return f"vLLM ended with exit code {child.exit_code}: {child.last_words()} (log: {child.log})"
