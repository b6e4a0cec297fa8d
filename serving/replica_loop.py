"""Runs one replica again and again: a pause after each failure, a restart on request.

=====================  ===================================  ==============================================
state                  event                                next
=====================  ===================================  ==============================================
starting, warming      it is verified                       ready
starting, warming      it ends, or takes too long           failed: a pause that doubles with each failure
ready                  it crashes or hangs                  failed: no pause after the first crash
ready                  a restart is requested               draining, stopping, starting
failed                 its pause ends                       starting
failed                 a restart is requested, or a reload  starting, at once
any                    `leaving` is set, the task cancelled  stopping; the supervisor drains it first
=====================  ===================================  ==============================================
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from serving.backoff import Backoff
from serving.errors import NotAdopted, ServingError
from serving.hanging import until_it_hangs
from serving.process import Adopted, Child
from serving.process_ledger import ProcessRecord
from serving.replica import Launch, Replica, State
from serving.replica_lifecycle import (
    STARTING_PATIENCE_SECONDS,
    LaunchContext,
    adopt_replica,
    replica_spec,
    start_replica,
)

log = logging.getLogger(__name__)

STEADY_SECONDS = 120.0  # after so long without a crash, the next one counts as the first
TURN = "waiting for its turn to start"
RESTART = "restart requested"


@dataclass(slots=True, eq=False)
class ReplicaLoop:
    """Keeps one replica running until it is `leaving`; `drain` waits for its requests, with a limit in seconds.

    `failures` counts failed starts in a row.
    """

    launch: Launch
    context: LaunchContext
    backoff: Backoff
    drain: Callable[[str, float], Awaitable[None]]
    clock: Callable[[], float] = time.monotonic
    wall_clock: Callable[[], float] = time.time
    failures: int = 0
    leaving: bool = False
    _pausing: bool = False
    _again: asyncio.Event = field(default_factory=asyncio.Event)

    def announce(self, port: int) -> None:
        """Enter the replica in the registry, before its first start and before each of the later ones."""
        self.context.source.put(replica_spec(self.launch, port), State.STARTING, TURN)

    def start_now(self) -> None:
        """End the pause before the next start, if there is one."""
        if self._pausing:
            self._again.set()

    def restart(self) -> str:
        """Start the replica again: at once if it waits, drained first if it is ready; returns what happens."""
        status = self.context.registry.status(self.launch.replica_id)
        if self._pausing:
            self._again.set()
            return "starts again now"
        if status.state is State.READY and not self.leaving:
            self._again.set()
            return f"finishes its requests (at most {self.launch.settings.drain_seconds:g} s), then starts again"
        return f"is {status.state} already ({status.reason}); nothing to do"

    async def run(self, record: ProcessRecord | None = None) -> None:
        """Start the replica, or adopt the one of a record, and start it again whenever it has ended."""
        crashes, pause = 0, 0.0
        while not self.leaving:
            pause = 0.0
            try:
                async with self._started_or_adopted(record) as (child, replica):
                    began = self.clock()
                    reason = await self._serve(child, replica)
                    if self.leaving:
                        return
                    if reason == RESTART:
                        crashes = 0
                        await self._drain()
                    else:
                        crashes = 1 if self.clock() - began > STEADY_SECONDS else crashes + 1
                        pause = self.backoff.after_crash(crashes)
                        # Out of rotation before the clean-up, which may take a while.
                        self._fail(reason, pause)
            except NotAdopted as error:
                log.warning("%s", error)
            except ServingError as error:
                pause = self._start_failed(str(error))
            except Exception as error:  # the outermost loop: a defect must not leave a replica "starting" for ever
                pause = self._start_failed(f"the supervisor has a defect: {error!r}")
                log.exception("replica %s: the supervisor has a defect", self.launch.replica_id)
            record = None
            if await self._restarted_within(pause):
                crashes = self.failures = 0
            if not self.leaving:
                self.announce(self.launch.port or 0)

    async def _serve(self, child: Child | Adopted, replica: Replica) -> str:
        """Put a verified replica into rotation until it ends, hangs or is to be restarted; returns which."""
        self.failures = 0
        self._again.clear()
        self.context.source.put(replica, State.READY)
        hanging = until_it_hangs(replica, self.context.probe, self.launch.settings.hang_seconds, self.clock)
        ended = await _first(child.wait(), hanging, self._restart_requested())
        if ended == RESTART:
            return ended
        if child.exit_code is None:
            child.patience_seconds = STARTING_PATIENCE_SECONDS
            return f"{ended} (log: {child.log})"
        # Also with code 0: that is how vLLM leaves when its engine died.
        return f"crashed with {ended}: {child.last_words()} (log: {child.log})"

    async def _restart_requested(self) -> str:
        await self._again.wait()
        return RESTART

    async def _drain(self) -> None:
        replica_id, seconds = self.launch.replica_id, self.launch.settings.drain_seconds
        self.context.source.move(replica_id, State.DRAINING, f"{RESTART}: finishes its requests, at most {seconds:g} s")
        await self.drain(replica_id, seconds)
        self.context.source.move(replica_id, State.STOPPING, RESTART)

    async def _restarted_within(self, pause_seconds: float) -> bool:
        """Wait until the next start is due; returns whether it was requested earlier."""
        self._pausing = True
        try:
            async with asyncio.timeout(pause_seconds):
                await self._again.wait()
        except TimeoutError:
            return False
        finally:
            self._pausing = False
            self._again.clear()
        return True

    @asynccontextmanager
    async def _started_or_adopted(self, record: ProcessRecord | None) -> AsyncIterator[tuple[Child | Adopted, Replica]]:
        launch, context = self.launch, self.context
        process = adopt_replica(launch, record, context) if record else start_replica(launch, context)
        async with process as (child, replica):
            yield child, replica

    def _start_failed(self, reason: str) -> float:
        reason = reason.removeprefix(f"{self.launch.replica_id}: ")
        self.failures += 1
        pause = self.backoff.after_start_failure(self.failures)
        self._fail(reason, pause)
        return pause

    def _fail(self, reason: str, pause_seconds: float) -> None:
        # What it waits for comes first: `ps` cuts a long reason at its end.
        due = time.strftime("%H:%M:%S", time.localtime(self.wall_clock() + pause_seconds))
        self.context.source.move(self.launch.replica_id, State.FAILED, f"next start at {due}: {reason}")
        log.error("replica %s: %s; next start in %g s", self.launch.replica_id, reason, pause_seconds)


async def _first(*waits: Coroutine[Any, Any, str]) -> str:
    """The result of whichever is done first; the others are cancelled."""
    tasks = [asyncio.create_task(each) for each in waits]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return next(task for task in tasks if task in done).result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
