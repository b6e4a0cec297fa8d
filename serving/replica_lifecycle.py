"""Lifecycle of a replica: start or adopt its process, wait until it is verified, and stop all of it."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from serving.command import Machine, build_command
from serving.duration import duration
from serving.errors import NotAdopted, ServingError, StartFailed
from serving.identity import launch_digest
from serving.machine import free_port
from serving.preflight import check_placement, refuse_altered
from serving.probe import Probe
from serving.process import Adopted, Child
from serving.process_ledger import ProcessLedger, ProcessRecord
from serving.registry import Registry, ReplicaSource
from serving.replica import SUPERVISOR, Launch, Replica, State
from serving.start_times import StartTimes
from serving.templates.tool_calling import takes_tools
from serving.verification import verified

READY_POLL_SECONDS = 0.2
STARTING_PATIENCE_SECONDS = 2.0  # SIGTERM during start-up is often swallowed
READY_PATIENCE_SECONDS = 15.0  # an idle vLLM takes 4-6 s to leave
ADOPTION_SECONDS = 5.0  # a server that runs answers /health at once


@dataclass(frozen=True, slots=True)
class LaunchContext:
    """What a supervisor starts its replicas with."""

    registry: Registry
    machine: Machine
    probe: Probe
    ledger: ProcessLedger
    log_folder: Path
    turns: asyncio.Semaphore
    patience_seconds: float = READY_PATIENCE_SECONDS
    adoption_seconds: float = ADOPTION_SECONDS
    start_times: StartTimes = field(default_factory=StartTimes)
    clock: Callable[[], float] = time.monotonic

    @property
    def source(self) -> ReplicaSource:
        """The handle that writes the registry entries of started replicas."""
        return self.registry.source(SUPERVISOR)


@asynccontextmanager
async def start_replica(launch: Launch, context: LaunchContext) -> AsyncIterator[tuple[Child, Replica]]:
    """Start and verify a replica; its processes are stopped after the block."""
    port = launch.port or free_port()
    async with AsyncExitStack() as stack:
        # The start slot is released when the replica is ready; the stack keeps its process.
        async with context.turns:
            await _verify_files(launch, context)
            # What fitted at the first start may not fit any more; a start that exhausts memory could end others.
            await asyncio.to_thread(check_placement, [launch])
            command = build_command(launch, port, context.machine)
            child = Child(command, _log(launch, context), STARTING_PATIENCE_SECONDS)
            await stack.enter_async_context(_recorded(child, launch, launch_digest(launch), port, context))
            child.release()
            began = context.clock()
            context.source.put(replica_spec(launch, port), State.STARTING, _loading_reason(launch, child, context))
            await _wait_until_listening(launch, child, context, launch.settings.start_timeout_seconds)
            replica = await _verify(launch, port, context)
            context.start_times.add(launch, context.clock() - began)
        child.patience_seconds = context.patience_seconds
        yield child, replica


@asynccontextmanager
async def adopt_replica(
    launch: Launch, record: ProcessRecord, context: LaunchContext
) -> AsyncIterator[tuple[Adopted, Replica]]:
    """Adopt and verify an orphaned replica; NotAdopted, and it is stopped, if that fails."""
    async with AsyncExitStack() as stack:
        try:
            child = Adopted(record.session, _log(launch, context), STARTING_PATIENCE_SECONDS)
            await stack.enter_async_context(_recorded(child, launch, record.launch, record.port, context))
            context.source.put(replica_spec(launch, record.port), State.WARMING, f"found running, process {child.pid}")
            await _wait_until_listening(launch, child, context, context.adoption_seconds)
            replica = await _verify(launch, record.port, context)
        except ServingError as error:
            raise NotAdopted(f"{launch.replica_id}: process {record.session} is not adopted: {error}") from error
        child.patience_seconds = context.patience_seconds
        yield child, replica


@asynccontextmanager
async def _recorded(
    child: Child | Adopted, launch: Launch, digest: str, port: int, context: LaunchContext
) -> AsyncIterator[None]:
    """Keep a record of a child process in the ledger until all its processes have ended."""
    async with child:
        with context.ledger.running(launch.replica_id, digest, port, child.pid):
            try:
                yield
            finally:
                await child.stop()


def _loading_reason(launch: Launch, child: Child, context: LaunchContext) -> str:
    usual = context.start_times.usual_seconds(launch)
    estimate = "its first start here" if usual is None else f"usually ready after {duration(usual)}"
    return f"loading, process {child.pid}, {estimate}"


def replica_spec(launch: Launch, port: int) -> Replica:
    """Return the replica that a launch at a port becomes."""
    key = launch.settings.api_key.get_secret_value() if launch.settings.api_key else None
    url = f"http://127.0.0.1:{port}"
    variant = launch.variant
    return Replica(
        launch.replica_id,
        variant.name,
        variant.precision,
        url,
        launch.replica_id,
        key,
        max_in_flight=launch.settings.max_in_flight,
        tools=takes_tools(launch),
        adapters=tuple([lora.name for lora in variant.loras]),
    )


async def _verify_files(launch: Launch, context: LaunchContext) -> None:
    """Compare the variant's files with its manifest, in a thread: the first time all of them are read."""
    if launch.variant.manifest is None:
        return
    context.source.put(replica_spec(launch, launch.port or 0), State.STARTING, "verifying checksums")
    stopped = threading.Event()
    try:
        await asyncio.to_thread(refuse_altered, launch, context.machine.cache_directory / "seals", stopped.is_set)
    finally:
        stopped.set()


async def _verify(launch: Launch, port: int, context: LaunchContext) -> Replica:
    replica = replica_spec(launch, port)
    context.source.put(replica, State.WARMING, "verifying")
    return await verified(launch, replica, context.probe)


async def _wait_until_listening(
    launch: Launch, child: Child | Adopted, context: LaunchContext, limit_seconds: float
) -> None:
    """Wait until the server is healthy; StartFailed with the end of its log if it exits or exceeds the limit."""
    url = context.registry.status(launch.replica_id).replica.url
    try:
        async with asyncio.timeout(limit_seconds):
            while not await context.probe.healthy(url):
                if child.exit_code is not None:
                    why = f"ended with {await child.wait()} before it was ready: {child.last_words()}"
                    raise StartFailed(f"{launch.replica_id}: {why} (log: {child.log})")
                await asyncio.sleep(READY_POLL_SECONDS)
    except TimeoutError:
        why = f"not ready after {limit_seconds:g} s: {child.last_words()}"
        raise StartFailed(f"{launch.replica_id}: {why} (log: {child.log})") from None


def _log(launch: Launch, context: LaunchContext) -> Path:
    return context.log_folder / f"{launch.replica_id}.log"
