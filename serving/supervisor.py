"""Keeps the configured replicas running: start or adopt, verify, watch, restart, replace, drain, stop."""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from types import TracebackType
from typing import Self

from config.schema import LogSettings
from serving.backoff import Backoff
from serving.command import Machine
from serving.errors import LaunchRefused, NoSuchReplica, UpdateFailed
from serving.identity import launch_digest, slot_of, successor_id
from serving.log_file import keep_short
from serving.preflight import check_placement, check_servable
from serving.probe import Probe
from serving.process_ledger import ProcessLedger, ProcessRecord
from serving.registry import Registry, ReplicaSource
from serving.replica import SUPERVISOR, Launch, State
from serving.replica_lifecycle import ADOPTION_SECONDS, READY_PATIENCE_SECONDS, LaunchContext
from serving.replica_loop import ReplicaLoop
from serving.rolling import Current, Replace, Retire, Start, Step, next_step
from serving.start_times import StartTimes
from serving.state.draining import TrafficDrain, drain

log = logging.getLogger(__name__)

START_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class _RunningReplica:
    """A replica's loop, and the task that runs it."""

    loop: ReplicaLoop
    task: asyncio.Task[None]


@dataclass(slots=True)
class Supervisor:
    """Owns the processes of all launches while the `async with` block runs.

    A failed replica is restarted without limit; an update tries its replacement `start_attempts` times.
    """

    launches: tuple[Launch, ...]
    registry: Registry
    machine: Machine
    probe: Probe
    ledger: ProcessLedger
    log_folder: Path
    parallel_starts: int = 1
    backoff: Backoff = field(default_factory=Backoff)
    start_attempts: int = START_ATTEMPTS
    logs: LogSettings = field(default_factory=LogSettings)
    traffic: TrafficDrain | None = None
    patience_seconds: float = READY_PATIENCE_SECONDS
    adoption_seconds: float = ADOPTION_SECONDS
    start_times: StartTimes = field(default_factory=StartTimes)
    clock: Callable[[], float] = time.monotonic
    _replicas: dict[str, _RunningReplica] = field(default_factory=dict)
    _context: LaunchContext = field(init=False)
    _source: ReplicaSource = field(init=False)
    _updating: asyncio.Lock = field(default_factory=asyncio.Lock)
    _housekeeping: asyncio.Task[None] | None = None

    def __post_init__(self) -> None:
        self._source = self.registry.source(SUPERVISOR)
        shared = (self.registry, self.machine, self.probe, self.ledger, self.log_folder)
        turns = asyncio.Semaphore(self.parallel_starts)
        self._context = LaunchContext(
            *shared, turns, self.patience_seconds, self.adoption_seconds, self.start_times, self.clock
        )

    async def __aenter__(self) -> Self:
        """Recover the replicas of a dead supervisor, and start the others in order."""
        for launch in self.launches:
            check_servable(launch)
        orphans = await self._recover()
        check_placement([launch for launch in self.launches if launch.replica_id not in orphans])
        for launch in self.launches:
            record = orphans.get(launch.replica_id)
            self._start(replace(launch, replica_id=record.replica) if record else launch, record)
        self._housekeeping = asyncio.create_task(self._rotate_logs(), name="log rotation")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Drain and stop every replica with all its processes."""
        if self._housekeeping:
            self._housekeeping.cancel()
            await asyncio.gather(self._housekeeping, return_exceptions=True)
        await asyncio.gather(*(self._retire(replica_id) for replica_id in tuple(self._replicas)))

    def bound_cores(self) -> dict[str, str]:
        """Return the cores of the replicas that run, by the id that a configuration gives them."""
        launches = [running.loop.launch for running in self._replicas.values()]
        return {slot_of(launch.replica_id): launch.cores for launch in launches if launch.cores}

    async def update(self, wanted: tuple[Launch, ...], ready: Callable[[], None] = lambda: None) -> None:
        """Change to other launches, one replica at a time; where there is room, a new one starts before the old stops.

        `ready` is called when all new replicas are ready and before obsolete ones are stopped, or earlier where there
        is no room for both. Pauses before a next start end. LaunchRefused: nothing else was changed. UpdateFailed:
        replicas that were not replaced yet keep running.
        """
        async with self._updating:
            self._start_waiting(wanted)
            for launch in wanted:
                await asyncio.to_thread(check_servable, launch)
            self._set_times(wanted)
            announced = False
            while step := next_step(self._current(), wanted):
                if isinstance(step, Retire) and not announced:
                    ready()
                    announced = True
                await self._apply(step)
            self.launches = wanted
            if not announced:
                ready()

    def restart(self, replica_id: str) -> str:
        """Restart a replica, after draining if it is ready; return what happens. NoSuchReplica for an unknown id."""
        running = self._replicas.get(replica_id)
        if running is None:
            near = get_close_matches(replica_id, self._replicas, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise NoSuchReplica(f"there is no replica {replica_id!r}; {hint}known: {', '.join(sorted(self._replicas))}")
        return running.loop.restart()

    def _start_waiting(self, wanted: tuple[Launch, ...]) -> None:
        """End the pauses of unchanged replicas that wait for their next start."""
        digests = {launch.replica_id: launch_digest(launch) for launch in wanted}
        for replica_id, running in self._replicas.items():
            if digests.get(slot_of(replica_id)) == launch_digest(running.loop.launch):
                running.loop.start_now()

    def _set_times(self, wanted: tuple[Launch, ...]) -> None:
        """Give running replicas the time limits of the new launches: they change without a restart."""
        launches = {launch.replica_id: launch for launch in wanted}
        for replica_id, running in self._replicas.items():
            launch = launches.get(slot_of(replica_id))
            if launch is not None and launch_digest(launch) == launch_digest(running.loop.launch):
                running.loop.launch = replace(launch, replica_id=replica_id)

    async def _recover(self) -> dict[str, ProcessRecord]:
        """Return the records of orphaned replicas to adopt, by slot; stop those whose launch has changed."""
        wanted = {launch.replica_id: launch_digest(launch) for launch in self.launches}
        adoptable: dict[str, ProcessRecord] = {}
        for record in self.ledger.orphaned():
            slot = slot_of(record.replica)
            if wanted.get(slot) == record.launch and slot not in adoptable:
                adoptable[slot] = record
                continue
            await self.ledger.end(record)
            log.warning("stopped orphaned replica %s: it is not configured any more, or has changed", record.replica)
        return adoptable

    def _start(self, launch: Launch, record: ProcessRecord | None = None) -> None:
        loop = ReplicaLoop(launch, self._context, self.backoff, self._drain, self.clock)
        loop.announce(record.port if record else launch.port or 0)
        task = asyncio.create_task(loop.run(record), name=f"replica {launch.replica_id}")
        self._replicas[launch.replica_id] = _RunningReplica(loop, task)

    def _current(self) -> list[Current]:
        statuses = {status.replica.id: status for status in self.registry.snapshot()}
        return [
            Current(running.loop.launch, statuses[name].state is State.READY, statuses[name].in_flight)
            for name, running in self._replicas.items()
        ]

    async def _apply(self, step: Step) -> None:
        obstacle = None
        if isinstance(step, Replace) and step.surge:
            # In a thread: it reads the machine, and the gateway may share this event loop.
            obstacle = await asyncio.to_thread(_no_room, step.launch)
        match step:
            case Start(launch):
                await self._scale_up(launch)
            case Retire(replica_id):
                await self._scale_down(replica_id)
            case Replace(replica_id, launch, surge=True) if obstacle is None:
                log.info("replica %s is replaced: the new one starts first", replica_id)
                await self._scale_up(replace(launch, replica_id=successor_id(replica_id)))
                await self._scale_down(replica_id)
            case Replace(replica_id, launch):
                why = f": {obstacle}" if obstacle else ""
                log.info(
                    "replica %s is replaced: there is no room for both, so the old one stops first%s", replica_id, why
                )
                await self._scale_down(replica_id)
                await self._scale_up(replace(launch, replica_id=replica_id))

    async def _scale_up(self, launch: Launch) -> None:
        """Start a replica and wait until it is ready; UpdateFailed, and it is removed, after `start_attempts`."""
        self._start(launch)
        loop = self._replicas[launch.replica_id].loop
        while (status := self.registry.status(launch.replica_id)).state is not State.READY:
            if loop.failures >= self.start_attempts:
                await self._scale_down(launch.replica_id)
                raise UpdateFailed(f"the update stops: {launch.replica_id} does not start: {status.reason}")
            await self.registry.changed()

    async def _scale_down(self, replica_id: str) -> None:
        await self._retire(replica_id)
        self._source.remove(replica_id)

    async def _retire(self, replica_id: str) -> None:
        """Deregister the replica, wait until its requests end or the limit, then stop it."""
        running = self._replicas[replica_id]
        running.loop.leaving = True
        if self.registry.status(replica_id).state in (State.READY, State.DRAINING):
            seconds = running.loop.launch.settings.drain_seconds
            self._source.move(replica_id, State.DRAINING, f"finishes its requests, for at most {seconds:g} s")
            await self._drain(replica_id, seconds)
        self._source.move(replica_id, State.STOPPING, "stop requested")
        running.task.cancel()
        await asyncio.gather(running.task, return_exceptions=True)
        del self._replicas[replica_id]
        self._source.move(replica_id, State.STOPPED, "stop requested")

    async def _drain(self, replica_id: str, limit_seconds: float) -> None:
        replica = self.registry.status(replica_id).replica
        if not await drain(replica, self.registry, self.probe, self.traffic, limit_seconds):
            log.warning("replica %s still has requests after %g s: they are cut off", replica_id, limit_seconds)

    async def _rotate_logs(self) -> None:
        await keep_short(self.log_folder, self.logs, lambda: tuple(self._replicas))


def _no_room(launch: Launch) -> str | None:
    """Return why a launch cannot run beside the running replicas, or None."""
    try:
        check_placement([launch])
    except LaunchRefused as refused:
        return str(refused)
    return None
