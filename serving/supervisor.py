"""Keeps the wanted replicas running: start, warm, verify, watch, restart, drain, stop."""

import asyncio
import dataclasses
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from serving.backoff import Backoff
from serving.command import Machine, build_command
from serving.errors import LaunchRefused, ProbeFailed, ServingError, StartFailed
from serving.leftovers import Notebook
from serving.machine import free_port, port_is_free
from serving.preflight import refuse_altered, refuse_hopeless
from serving.probe import Probe
from serving.process import Child
from serving.registry import Registry
from serving.replica import Launch, Replica, State
from serving.thinking import thinking_verified

log = logging.getLogger(__name__)

READY_POLL_SECONDS = 0.2
STARTING_PATIENCE_SECONDS = 2.0  # SIGTERM during start-up is often swallowed
READY_PATIENCE_SECONDS = 15.0  # an idle vLLM takes 4-6 s to leave
STEADY_SECONDS = 120.0  # after so long without a crash, the next one counts as the first


@dataclass(slots=True)
class Supervisor:
    """Owns the processes of all launches while the `async with` block runs; nobody else starts or stops one."""

    launches: tuple[Launch, ...]
    registry: Registry
    machine: Machine
    probe: Probe
    notebook: Notebook
    log_folder: Path
    parallel_starts: int = 1
    backoff: Backoff = field(default_factory=Backoff)
    clock: Callable[[], float] = time.monotonic
    _tasks: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    _starts: asyncio.Semaphore = field(init=False)

    def __post_init__(self) -> None:
        self._starts = asyncio.Semaphore(self.parallel_starts)

    async def __aenter__(self) -> Self:
        """Clear away what a dead supervisor left, then begin to start every launch, in order."""
        for replica_id in await self.notebook.sweep():
            log.warning("ended replica %s, which had outlived its supervisor", replica_id)
        for launch in self.launches:
            refuse_hopeless(launch)
            if launch.port is not None and not port_is_free(launch.port):
                raise LaunchRefused(
                    f"{launch.replica_id}: port {launch.port} is in use; stop its owner or choose another"
                )
        for launch in self.launches:
            self.registry.put(_replica(launch, launch.port or 0), State.STARTING, "waiting for its turn to start")
            task = asyncio.create_task(self._keep(launch), name=f"replica {launch.replica_id}")
            self._tasks[launch.replica_id] = task
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Drain and stop every replica; afterwards no process of any is left."""
        await asyncio.gather(*(self._retire(launch) for launch in self.launches))

    async def _retire(self, launch: Launch) -> None:
        task = self._tasks.get(launch.replica_id)
        if task is None:
            return
        if self.registry.status(launch.replica_id).state is State.READY:
            self.registry.move(launch.replica_id, State.DRAINING, "asked to stop")
            with suppress(TimeoutError):
                await asyncio.wait_for(self.registry.idle(launch.replica_id), launch.settings.drain_seconds)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        self.registry.move(launch.replica_id, State.STOPPED, "asked to stop")

    async def _keep(self, launch: Launch) -> None:
        """Run one replica again and again until told to stop, or until it won't start."""
        failures = crashes = 0
        while True:
            try:
                async with self._running(launch) as (child, replica):
                    failures, began = 0, self.clock()
                    self.registry.put(replica, State.READY)
                    log.info("replica %s is ready at %s", replica.id, replica.url)
                    exit_code = await child.wait()
                    crashes = 1 if self.clock() - began > STEADY_SECONDS else crashes + 1
                    # Also with code 0: that is how vLLM leaves when its engine died.
                    reason = f"crashed with exit code {exit_code}: {child.last_words()} (log: {child.log})"
                    pause: float | None = self.backoff.after_crash(crashes)
                    # Out of rotation before the clean-up, which may take a while.
                    self._failed(launch, reason, pause)
            except ServingError as error:
                failures += 1
                pause = self.backoff.after_start_failure(failures)
                self._failed(launch, str(error), pause)
            except Exception as error:
                # The outermost loop: a defect must not leave a replica "starting" for ever.
                self._failed(launch, f"the supervisor has a defect: {error!r}", None)
                raise
            if pause is None:
                return
            await asyncio.sleep(pause)

    def _failed(self, launch: Launch, reason: str, pause_seconds: float | None) -> None:
        self.registry.move(launch.replica_id, State.FAILED, reason)
        plan = "given up" if pause_seconds is None else f"next start in {pause_seconds:g} s"
        log.error("replica %s: %s; %s", launch.replica_id, reason, plan)

    @asynccontextmanager
    async def _running(self, launch: Launch) -> AsyncIterator[tuple[Child, Replica]]:
        """A verified replica; its processes are gone after the block."""
        port = launch.port or free_port()
        child = Child(build_command(launch, port, self.machine), self.log_folder / f"{launch.replica_id}.log")
        async with AsyncExitStack() as stack:
            # The turn to start ends when the replica is ready; what was entered on the stack lives on.
            async with self._starts:
                await self._require_seal(launch)
                await stack.enter_async_context(child)
                stack.enter_context(self.notebook.running(launch.replica_id, child.pid))
                child.patience_seconds = STARTING_PATIENCE_SECONDS
                replica = await self._verified(launch, child, port)
            child.patience_seconds = READY_PATIENCE_SECONDS
            yield child, replica

    async def _require_seal(self, launch: Launch) -> None:
        """Hold the variant's files against its manifest, in a thread: the first time that is every byte of them."""
        if launch.variant.manifest is None:
            return
        self.registry.put(_replica(launch, launch.port or 0), State.STARTING, "comparing its files with their seal")
        stopped = threading.Event()
        try:
            await asyncio.to_thread(refuse_altered, launch, self.machine.cache_directory / "seals", stopped.is_set)
        finally:
            stopped.set()

    async def _verified(self, launch: Launch, child: Child, port: int) -> Replica:
        """Wait until the server listens, then have it prove that it is what was started."""
        replica = _replica(launch, port)
        self.registry.put(replica, State.STARTING, f"loading, process {child.pid}")
        await self._listening(launch, child, replica.url)
        self.registry.put(replica, State.WARMING, "verifying")
        served = await self.probe.served_model(replica)
        if served.name != replica.served_name or served.root != str(launch.variant.path):
            raise ProbeFailed(f"{replica.id}: {replica.url} serves {served.name} from {served.root}, not this replica")
        await self.probe.generate_one_token(replica)
        replica = await thinking_verified(self.probe, replica, launch.thinking)
        return dataclasses.replace(replica, max_model_len_tokens=served.max_model_len_tokens)

    async def _listening(self, launch: Launch, child: Child, url: str) -> None:
        limit_seconds = launch.settings.start_timeout_seconds
        try:
            async with asyncio.timeout(limit_seconds):
                while not await self.probe.healthy(url):
                    if child.exit_code is not None:
                        why = f"ended with exit code {child.exit_code} before it was ready: {child.last_words()}"
                        raise StartFailed(f"{launch.replica_id}: {why} (log: {child.log})")
                    await asyncio.sleep(READY_POLL_SECONDS)
        except TimeoutError:
            why = f"not ready after {limit_seconds:g} s: {child.last_words()}"
            raise StartFailed(f"{launch.replica_id}: {why} (log: {child.log})") from None


def _replica(launch: Launch, port: int) -> Replica:
    key = launch.settings.api_key.get_secret_value() if launch.settings.api_key else None
    url = f"http://127.0.0.1:{port}"
    variant = launch.variant
    return Replica(launch.replica_id, variant.name, variant.precision, url, launch.replica_id, key)
