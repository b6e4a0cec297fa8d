"""The socket through which `quantgate status`, `reload`, `restart` and `stop` reach a running process.

Each process has one, `$QUANTGATE_HOME/control/PID.sock`, which only its user can open. A connection carries one request
and one reply, each a JSON object on a line. `reload` and `stop` do what SIGHUP and SIGTERM do.
"""

import asyncio
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import msgspec

from serving.errors import ControlRefused, NoSuchReplica
from serving.registry import Registry
from serving.reload import ReloadResult

log = logging.getLogger(__name__)

FOLDER = "control"
REQUEST_SECONDS = 5.0
Action = Literal["status", "reload", "restart", "stop"]


class ControlRequest(msgspec.Struct, frozen=True):
    """A request to a process; `replica` is for a restart."""

    action: Action
    replica: str = ""


class ReplicaSummary(msgspec.Struct, frozen=True):
    """A replica as a process knows it; `seconds` is the time in its state."""

    id: str
    state: str
    reason: str
    seconds: float


class ProcessStatus(msgspec.Struct, frozen=True):
    """A running process: its command, configuration file, addresses, replicas, and its last reload.

    `reload` is None where the outcome is not known: a gateway with workers, or one that does not serve yet.
    """

    command: str
    pid: int
    config: str | None
    seconds: float
    addresses: dict[str, str]
    replicas: list[ReplicaSummary]
    reload: ReloadResult | None = None


class ControlReply(msgspec.Struct, frozen=True):
    """The process's status, and what was done or why it was refused."""

    status: ProcessStatus
    message: str = ""
    error: str = ""


@dataclass(frozen=True, slots=True)
class Controlled:
    """What a control socket shows and changes; without a `config` there is nothing to reload."""

    command: str
    config: Path | None
    registry: Registry = field(default_factory=Registry)
    addresses: dict[str, str] = field(default_factory=dict)
    clock: Callable[[], float] = time.monotonic


@dataclass(slots=True)
class ControlSocket:
    """Answers requests while the `async with` block runs; a home that can't be written costs a warning.

    `restart` starts a replica again, `last_reload` returns the outcome of the last reload. Both are set once they are
    there: the socket outlives them, so that `status` and `stop` see a process until its end.
    """

    home: Path
    controlled: Controlled
    restart: Callable[[str], str] | None = None
    last_reload: Callable[[], ReloadResult | None] = lambda: None
    _began: float = 0.0
    _server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        """Listen."""
        self._began = self.controlled.clock()
        try:
            listening = _listen(self._path)
        except OSError as error:
            log.warning("%s: %s; quantgate status, reload, restart and stop can't reach us", self._path, error.strerror)
            return self
        self._server = await asyncio.start_unix_server(self._serve, sock=listening)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.close()
            self._path.unlink(missing_ok=True)

    @property
    def _path(self) -> Path:
        return self.home / FOLDER / f"{os.getpid()}.sock"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                reply = self._reply(await reader.readline())
                writer.write(msgspec.json.encode(reply) + b"\n")
                await writer.drain()
        except (OSError, ValueError, TimeoutError):
            log.debug("a control connection ended early", exc_info=True)
        finally:
            writer.close()

    def _reply(self, line: bytes) -> ControlReply:
        try:
            request = msgspec.json.decode(line, type=ControlRequest)
            message, error = self._do(request), ""
        except (msgspec.DecodeError, ControlRefused, NoSuchReplica) as refused:
            message, error = "", str(refused)
        return ControlReply(self._status(), message, error)

    def _do(self, request: ControlRequest) -> str:
        controlled = self.controlled
        if request.action == "restart":
            if self.restart is None:
                raise NoSuchReplica(f"quantgate {controlled.command} runs no replicas")
            return self.restart(request.replica)
        if request.action == "reload":
            if controlled.config is None:
                raise ControlRefused(f"quantgate {controlled.command} follows no configuration file")
            if signal.getsignal(signal.SIGHUP) in (signal.SIG_DFL, None):
                raise ControlRefused("it is starting or stopping, and does not read its configuration now")
            os.kill(os.getpid(), signal.SIGHUP)
        if request.action == "stop":
            os.kill(os.getpid(), signal.SIGTERM)
        return ""

    def _status(self) -> ProcessStatus:
        controlled, clock = self.controlled, self.controlled.clock
        replicas = [
            ReplicaSummary(each.replica.id, each.state, each.reason, round(max(0.0, clock() - each.since_seconds), 1))
            for each in controlled.registry.snapshot()
        ]
        config = None if controlled.config is None else str(controlled.config.resolve())
        seconds = round(clock() - self._began, 1)
        addresses, reload = dict(controlled.addresses), self.last_reload()
        return ProcessStatus(controlled.command, os.getpid(), config, seconds, addresses, replicas, reload)


@contextmanager
def short_path(path: Path) -> Iterator[str]:
    """Give a path that fits into a socket address (unix(7): 108 bytes), however long the folder's is."""
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def _listen(path: Path) -> socket.socket:
    """Listen under another name first: a socket that is found accepts connections."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = path.with_suffix(".draft")
    draft.unlink(missing_ok=True)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with short_path(draft) as address:
            listening.bind(address)
        draft.chmod(0o600)
        listening.listen()
        listening.setblocking(False)
        draft.replace(path)
    except OSError:
        listening.close()
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        raise
    return listening
