"""Several gateway processes that share a listening socket for clients; each has its own admin port.

One event loop uses one core. Metrics with exemplars cannot be shared between processes, so each worker is scraped by
itself (gateway/README.md, "Workers"). The parent opens all sockets. With SO_REUSEPORT, each worker would have a socket
of its own, and the connections that wait there would be lost when the worker dies, or hands over. A worker that dies is
restarted; when the parent dies, its workers stop:

==================================  ==================================================================
phase of the worker                 how it learns that its parent has died
==================================  ==================================================================
until its first statements ran      they compare its parent's number with the one that was passed
while it imports and starts         the kernel sends SIGTERM (PR_SET_PDEATHSIG), which ends it at once
while it serves                     the same signal, or the end of the parent's pipe: it drains
==================================  ==================================================================
"""

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Self

from config.errors import ConfigError
from config.schema import GatewaySettings
from gateway.deployment import Deployment
from gateway.http.sockets import ADMIN, CLIENT, InheritedSockets, ListenSockets, NextAcceptor
from gateway.proxy.load.poll_share import descriptors_of, poll_sockets
from serving.service_manager import ServiceManager

log = logging.getLogger(__name__)

# Exponential backoff between restarts of a worker.
FIRST_BACKOFF_SECONDS = 0.5
MAX_BACKOFF_SECONDS = 30.0
# A worker that ran longer than this starts again with the first backoff.
BACKOFF_RESET_SECONDS = 60.0
KILL_AFTER_SECONDS = 10.0
# Tells a worker, before SIGTERM, that another process accepts connections on its sockets.
HANDED_OVER = signal.SIGUSR1
MAX_PORT = 65535

# The first statements of a worker, before anything is imported that takes time; see prctl(2). The parent may have died
# before the kernel knew that we want to hear of it, hence the comparison. A worker that has not read the configuration
# yet ignores a reload and a handover, which would end it otherwise.
BOOT = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
if ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM) or os.getppid() != int(sys.argv.pop(1)):
    sys.exit("the parent of this gateway worker has exited")
signal.signal(signal.SIGHUP, signal.SIG_IGN)
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
from quantgate import main
sys.exit(main())
"""


@dataclass(frozen=True, slots=True)
class WorkerIndex:
    """Position of a worker among all workers, counted from 1; as text `2/4`.

    `polls` are the descriptors of the sockets on which workers share polls (gateway.proxy.load.poll_share).
    """

    number: int = 1
    of: int = 1
    polls: tuple[int, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse `2/4`; ValueError if the text is not a valid index."""
        number, _, of = text.partition("/")
        index = cls(int(number), int(of))
        if not 1 <= index.number <= index.of:
            raise ValueError(f"{text!r} is not a worker index such as 2/4")
        return index

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    @property
    def share(self) -> float:
        """Fraction of a limit of the whole gateway that applies to this process."""
        return 1 / self.of


SINGLE_WORKER = WorkerIndex()


def with_worker_ports(deployment: Deployment, index: WorkerIndex) -> Deployment:
    """Return the deployment of one worker: worker K listens on the configured admin port + K - 1."""
    gateway = deployment.settings.gateway
    host, _, port = gateway.admin.rpartition(":")
    own = gateway.model_copy(update={"admin": f"{host}:{int(port) + index.number - 1}"})
    return replace(deployment, settings=deployment.settings.model_copy(update={"gateway": own}))


def check_ports(gateway: GatewaySettings, workers: int) -> None:
    """Raise ConfigError unless all ports are valid."""
    port = gateway.admin.rpartition(":")[2]
    if "0" in (port, gateway.listen.rpartition(":")[2]):
        raise ConfigError("--workers needs fixed ports: set gateway.listen and gateway.admin to ports other than 0")
    last = int(port) + workers - 1
    if last > MAX_PORT:
        raise ConfigError(
            f"gateway.admin: worker {workers} would have the admin port {last}, above {MAX_PORT}; "
            f"choose a lower port or fewer workers"
        )
    if int(port) <= int(gateway.listen.rpartition(":")[2]) <= last:
        raise ConfigError(
            f"gateway.admin: the admin ports of {workers} workers, {port} to {last}, include the port of "
            f"gateway.listen; choose another port"
        )


@dataclass(slots=True)
class WorkerSockets:
    """The listening sockets of all workers: the one for clients, and an admin socket for each, in their order.

    `next_acceptor` as of `gateway.http.sockets.ListenSockets`.
    """

    client: socket.socket
    admin: tuple[socket.socket, ...]
    next_acceptor: NextAcceptor

    @property
    def by_name(self) -> dict[str, socket.socket]:
        """The sockets by the names under which they are handed over."""
        named = {admin_name(number): each for number, each in enumerate(self.admin, start=1)}
        return {CLIENT: self.client, **named}

    def arguments(self, index: WorkerIndex) -> tuple[list[str], list[int]]:
        """The options with which a worker inherits its sockets, and their file descriptors.

        While the predecessor accepts connections, a worker begins only when its replicas are verified.
        """
        descriptors = [self.client.fileno(), self.admin[index.number - 1].fileno()]
        others = {"none": [], "next start": ["--sockets-kept"], "successor": ["--verified"]}
        return ["--sockets", *map(str, descriptors), *others[self.next_acceptor]], descriptors


def admin_name(number: int) -> str:
    """Return the name of a worker's admin socket: `admin`, `admin2`, ..."""
    return ADMIN if number == 1 else f"{ADMIN}{number}"


@contextmanager
def worker_sockets(gateway: GatewaySettings, count: int, inherited: InheritedSockets) -> Iterator[WorkerSockets]:
    """Take the ports of all workers; ConfigError if one is invalid or in use."""
    check_ports(gateway, count)
    host, _, port = gateway.admin.rpartition(":")
    with ExitStack() as stack:
        client = stack.enter_context(inherited.take(CLIENT, gateway.listen, "gateway.listen"))
        admin = [
            stack.enter_context(inherited.take(admin_name(number), f"{host}:{int(port) + number - 1}", "gateway.admin"))
            for number in range(1, count + 1)
        ]
        inherited.close_unused(client, *admin)
        yield WorkerSockets(client, tuple(admin), inherited.next_acceptor)


@asynccontextmanager
async def workers(
    config: Path, sockets: WorkerSockets, drain_seconds: Callable[[], float], manager: ServiceManager
) -> AsyncIterator["Workers"]:
    """Run a gateway process for each admin socket while the block runs, and forward SIGHUP to them.

    On exit they drain. Those that are still running KILL_AFTER_SECONDS after `drain_seconds`, which a reload may have
    changed, are killed.
    """
    # Each child polls the read end of this pipe: it becomes readable when the parent ends, for whatever reason.
    alive, parent_end = os.pipe()
    # Each child that accepts connections writes a byte into this one.
    listening, child_end = os.pipe()
    count = len(sockets.admin)
    pairs = poll_sockets(count)
    places = [WorkerIndex(number + 1, count, descriptors_of(number, pairs)) for number in range(count)]
    running = [Worker(config, place, sockets, alive, child_end) for place in places]
    loop = asyncio.get_running_loop()
    tasks = [asyncio.create_task(worker.run(), name=f"worker {worker.index}") for worker in running]

    def reload() -> None:
        with manager.reloading(f"{count} workers"):
            for worker in running:
                worker.send_signal(signal.SIGHUP)

    loop.add_signal_handler(signal.SIGHUP, reload)
    try:
        yield Workers(listening, count, count, manager)
    finally:
        # Without a handler, a SIGHUP would end the process in the middle of draining.
        loop.add_signal_handler(signal.SIGHUP, log.info, "SIGHUP: stopping, nothing to reload")
        for worker in running:
            worker.stop(handed_over=sockets.next_acceptor == "successor")
        _, late = await asyncio.wait(tasks, timeout=drain_seconds() + KILL_AFTER_SECONDS)
        if late:
            log.error("%d workers did not stop in time; killing them", len(late))
            for worker in running:
                worker.send_signal(signal.SIGKILL)
        await asyncio.gather(*tasks)
        for descriptor in (parent_end, alive, listening, child_end):
            os.close(descriptor)
        for each in chain.from_iterable(pairs):
            each.close()


@dataclass(slots=True)
class Workers:
    """The workers of a parent, of which `missing` have not accepted connections yet.

    `descriptor` is the read end of the pipe into which each writes a byte when it does. A worker that is restarted
    before all do counts twice.
    """

    descriptor: int
    count: int
    missing: int
    manager: ServiceManager

    async def listening(self) -> None:
        """Wait until all of them accept connections."""
        loop, some = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self.descriptor, some.set)
        try:
            while self.missing > 0:
                await some.wait()
                some.clear()
                self.missing -= len(os.read(self.descriptor, self.missing))
        finally:
            loop.remove_reader(self.descriptor)

    @asynccontextmanager
    async def announced(self, status: str) -> AsyncIterator[None]:
        """Tell the service manager when all of them accept connections, while the block runs."""

        async def announce() -> None:
            await self.listening()
            self.manager.ready(status)

        task = asyncio.create_task(announce(), name="announce the workers")
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


class Worker:
    """One gateway process and its restarts.

    `alive` is the read end of the parent's pipe, `listening` the write end of the one that says that it listens.
    """

    def __init__(self, config: Path, index: WorkerIndex, sockets: WorkerSockets, alive: int, listening: int) -> None:
        self.index = index
        self._config = config
        self._sockets = sockets
        self._alive, self._listening = alive, listening
        self._stopping = asyncio.Event()
        self._process: asyncio.subprocess.Process | None = None

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to the process, if it runs."""
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(number)

    def stop(self, *, handed_over: bool) -> None:
        """Let the process drain and exit, without a restart; `handed_over`: another process accepts connections."""
        self._stopping.set()
        if handed_over:
            self.send_signal(HANDED_OVER)
        self.send_signal(signal.SIGTERM)

    async def run(self) -> None:
        """Run the process, and restart it with backoff whenever it exits, until `stop` is called."""
        backoff_seconds, loop = FIRST_BACKOFF_SECONDS, asyncio.get_running_loop()
        while not self._stopping.is_set():
            started = loop.time()
            code = await self._run_once()
            if self._stopping.is_set():
                return
            if loop.time() - started > BACKOFF_RESET_SECONDS:
                backoff_seconds = FIRST_BACKOFF_SECONDS
            log.error("worker %s exited with code %s; restarting it in %g s", self.index, code, backoff_seconds)
            try:
                async with asyncio.timeout(backoff_seconds):
                    await self._stopping.wait()
            except TimeoutError:
                backoff_seconds = min(2 * backoff_seconds, MAX_BACKOFF_SECONDS)

    async def _run_once(self) -> int:
        arguments = ["gateway", str(self._config), "--worker", str(self.index)]
        pipes = ["--alive", str(self._alive), "--listening", str(self._listening)]
        polls = ["--polls", ",".join(map(str, self.index.polls))]
        sockets, descriptors = self._sockets.arguments(self.index)
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", BOOT, str(os.getpid()), *arguments, *pipes, *polls, *sockets),
            pass_fds=(self._alive, self._listening, *self.index.polls, *descriptors),
            # Ctrl-C on a terminal then reaches the parent only, which stops the workers in order.
            start_new_session=True,
        )
        if self._stopping.is_set():
            self.send_signal(signal.SIGTERM)
        return await self._process.wait()


@contextmanager
def handed_over_by_parent(taken: ListenSockets, index: WorkerIndex) -> Iterator[None]:
    """Learn from the parent of several workers that its successor accepts connections, while the block runs."""
    if index.of == 1:
        yield
        return

    def on_signal() -> None:
        taken.next_acceptor = "successor"

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(HANDED_OVER, on_signal)
    try:
        yield
    finally:
        # Without a handler, the signal would end a process that drains.
        loop.remove_signal_handler(HANDED_OVER)
        signal.signal(HANDED_OVER, signal.SIG_IGN)


@asynccontextmanager
async def stop_with_parent(alive: int | None) -> AsyncIterator[None]:
    """Drain and stop this process when the parent's end of the pipe is closed; None: it has no parent to watch."""
    if alive is None:
        yield
        return
    loop = asyncio.get_running_loop()

    def on_parent_exit() -> None:
        loop.remove_reader(alive)
        log.warning("the parent process has exited; stopping this worker")
        os.kill(os.getpid(), signal.SIGTERM)

    loop.add_reader(alive, on_parent_exit)
    try:
        yield
    finally:
        loop.remove_reader(alive)
