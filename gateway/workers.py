"""Several gateway processes on one port: the kernel spreads connections over them, each has an admin port of its own.

One event loop fills one core; metrics with exemplars can't be shared between processes, so every worker is scraped by
itself (README, "Several workers"). A worker that dies is started again; when the parent dies, its workers stop.
"""

import asyncio
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from config.errors import ConfigError
from config.schema import GatewaySettings
from gateway.deployment import Deployment
from gateway.http.listener import bind

log = logging.getLogger(__name__)

FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 30.0
# A worker that ran for so long and then died has not failed to start.
SETTLED_SECONDS = 60.0
KILL_AFTER_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class WorkerIndex:
    """Which one of how many workers a process is; written `2/4`, counted from 1."""

    number: int = 1
    of: int = 1

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `2/4`; ValueError if it isn't one."""
        number, _, of = text.partition("/")
        place = cls(int(number), int(of))
        if not 1 <= place.number <= place.of:
            raise ValueError(f"{text!r} is no place")
        return place

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    @property
    def share(self) -> float:
        """What part this process has of what is limited in all of them together."""
        return 1 / self.of


SINGLE_WORKER = WorkerIndex()


def with_worker_ports(deployment: Deployment, place: WorkerIndex) -> Deployment:
    """The deployment of one worker: the first one's admin port is the configured one, the others' follow it."""
    gateway = deployment.settings.gateway
    host, _, port = gateway.admin.rpartition(":")
    moved = gateway.model_copy(update={"admin": f"{host}:{int(port) + place.number - 1}"})
    return replace(deployment, settings=deployment.settings.model_copy(update={"gateway": moved}))


def check_ports(gateway: GatewaySettings, workers: int) -> None:
    """ConfigError unless all workers can listen: somebody else's port would be shared with us in silence."""
    host, _, port = gateway.admin.rpartition(":")
    if "0" in (port, gateway.listen.rpartition(":")[2]):
        raise ConfigError("--workers needs ports of its own: gateway.listen and gateway.admin can't be port 0")
    bind(gateway.listen, "gateway.listen").close()
    for number in range(workers):
        bind(f"{host}:{int(port) + number}", "gateway.admin").close()


@asynccontextmanager
async def workers(config: Path, count: int, drain_seconds: float) -> AsyncIterator[None]:
    """Run so many gateways while the block runs; SIGHUP reaches each.

    At its end they drain; one that hasn't ended well after `drain_seconds` is killed.
    """
    # Each child reads from this pipe: when we are gone, however that came, it reads its end.
    alive, ours = os.pipe()
    running = [Worker(config, WorkerIndex(number + 1, count), alive) for number in range(count)]
    loop = asyncio.get_running_loop()
    tasks = [asyncio.create_task(worker.keep(), name=f"worker {worker.place}") for worker in running]

    def reload() -> None:
        for worker in running:
            worker.tell(signal.SIGHUP)

    loop.add_signal_handler(signal.SIGHUP, reload)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGHUP)
        for worker in running:
            worker.stop()
        _, late = await asyncio.wait(tasks, timeout=drain_seconds + KILL_AFTER_SECONDS)
        if late:
            log.error("%d workers don't end by themselves; they are killed", len(late))
            for worker in running:
                worker.tell(signal.SIGKILL)
        await asyncio.gather(*tasks)
        os.close(ours)
        os.close(alive)


class Worker:
    """One child process, started again when it dies until it is told to stop."""

    def __init__(self, config: Path, place: WorkerIndex, alive: int) -> None:
        self.place = place
        self._config = config
        self._alive = alive
        self._stopping = asyncio.Event()
        self._process: asyncio.subprocess.Process | None = None

    def tell(self, number: signal.Signals) -> None:
        """Send a signal, if there is anybody to get it."""
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(number)

    def stop(self) -> None:
        """Have it drain and end."""
        self._stopping.set()
        self.tell(signal.SIGTERM)

    async def keep(self) -> None:
        """Run the process, again and again, until it is stopped."""
        pause_seconds, loop = FIRST_PAUSE_SECONDS, asyncio.get_running_loop()
        while not self._stopping.is_set():
            began = loop.time()
            code = await self._run()
            if self._stopping.is_set():
                return
            if loop.time() - began > SETTLED_SECONDS:
                pause_seconds = FIRST_PAUSE_SECONDS
            log.error("worker %s ended with code %s; it is started again in %g s", self.place, code, pause_seconds)
            try:
                async with asyncio.timeout(pause_seconds):
                    await self._stopping.wait()
            except TimeoutError:
                pause_seconds = min(2 * pause_seconds, LONGEST_PAUSE_SECONDS)

    async def _run(self) -> int:
        arguments = ("gateway", str(self._config), "--worker", str(self.place), "--alive", str(self._alive))
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", "import sys; from quantgate import main; sys.exit(main())", *arguments),
            pass_fds=(self._alive,),
            # A terminal's Ctrl-C is the parent's to pass on, once.
            start_new_session=True,
        )
        if self._stopping.is_set():
            self.tell(signal.SIGTERM)
        return await self._process.wait()


@asynccontextmanager
async def ending_with_parent(alive: int | None) -> AsyncIterator[None]:
    """Have this process drain when the other end of a pipe is closed, because its parent is gone."""
    if alive is None:
        yield
        return
    loop = asyncio.get_running_loop()

    def gone() -> None:
        loop.remove_reader(alive)
        log.warning("the parent process is gone; this worker stops")
        os.kill(os.getpid(), signal.SIGTERM)

    loop.add_reader(alive, gone)
    try:
        yield
    finally:
        loop.remove_reader(alive)
