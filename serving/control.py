"""The socket through which `quantgate status`, `reload`, `restart` and `stop` reach a running process.

Each process has one, `$QUANTGATE_HOME/control/PID.sock`, which only its user can open. A connection carries one request
and one reply, each a JSON object on a line. `reload` and `stop` do what SIGHUP and SIGTERM do.

`takeover` passes the listening sockets of a gateway to its successor (SCM_RIGHTS with the reply) and leaves the
connection open. This process goes on as before; a second request on it, `commit`, makes it stop:

============================  =============================  ==========================================
event                         successor                      this process
============================  =============================  ==========================================
`takeover`                    has the sockets, and starts    accepts connections
`commit`                      accepts connections            accepts no more, finishes its requests, ends
end of the connection before  has failed                     accepts connections
a stop before                 starts                         accepts no more, finishes its requests, ends
============================  =============================  ==========================================
"""

import asyncio
import logging
import os
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator, Mapping
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
# Longer than a successor takes to start.
COMMIT_SECONDS = 300.0
Action = Literal["status", "reload", "restart", "stop", "takeover", "commit"]


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

    `reload` is None where the outcome is not known: a gateway with workers, or one that does not serve yet. `takeover`:
    a successor can ask for its listening sockets.
    """

    command: str
    pid: int
    config: str | None
    seconds: float
    addresses: dict[str, str]
    replicas: list[ReplicaSummary]
    reload: ReloadResult | None = None
    takeover: bool = False


class ControlReply(msgspec.Struct, frozen=True):
    """The process's status, and what was done or why it was refused; `sockets` names those that come with it."""

    status: ProcessStatus
    message: str = ""
    error: str = ""
    sockets: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Takeover:
    """The listening sockets that a successor gets, by name, and what to do when it accepts connections.

    `commit` is called with the successor's process number. `refusal` says why no successor gets them; empty: it does.
    """

    sockets: Mapping[str, socket.socket]
    commit: Callable[[int], None]
    refusal: str = ""


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

    `restart` starts a replica again, `last_reload` returns the outcome of the last reload, `takeover` is what a
    successor gets. They are set while they are there: the socket outlives them, so that `status` and `stop` see a
    process until its end.
    """

    home: Path
    controlled: Controlled
    restart: Callable[[str], str] | None = None
    last_reload: Callable[[], ReloadResult | None] = lambda: None
    takeover: Takeover | None = None
    successor_starts: bool = False  # one has the sockets, and has neither committed nor failed
    _began: float = 0.0
    _server: asyncio.Server | None = None
    _connections: set[asyncio.Task[None]] = field(default_factory=set)

    async def __aenter__(self) -> Self:
        """Listen."""
        self._began = self.controlled.clock()
        try:
            listening = _listen(self._path)
        except OSError as error:
            log.warning("%s: %s; quantgate status, reload, restart and stop can't reach us", self._path, error.strerror)
            return self
        self._server = await asyncio.start_unix_server(self._accept, sock=listening)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop listening, and end the connections."""
        if self._server is not None:
            self._server.close()
            self._path.unlink(missing_ok=True)
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    @property
    def _path(self) -> Path:
        return self.home / FOLDER / f"{os.getpid()}.sock"

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # asyncio's own task for a connection logs a traceback when the event loop cancels it at its end.
        task = asyncio.create_task(self._serve(reader, writer), name="control connection")
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                line = await reader.readline()
                takeover = self._takeover_for(line)
                if takeover is None:
                    await _send(writer, self._reply(line))
            if takeover is not None:
                await self._hand_over(takeover, reader, writer)
        except (OSError, ValueError, TimeoutError, msgspec.DecodeError):
            log.debug("a control connection ended early", exc_info=True)
        finally:
            writer.close()

    def _takeover_for(self, line: bytes) -> Takeover | None:
        """What a successor gets; None if the request is another one, or has to be refused."""
        try:
            request = msgspec.json.decode(line, type=ControlRequest)
        except msgspec.DecodeError:
            return None
        takeover = self.takeover
        if request.action != "takeover" or takeover is None or takeover.refusal or self.successor_starts:
            return None
        return takeover

    async def _hand_over(self, takeover: Takeover, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass the sockets to a successor, and stop when it commits; if it fails before, nothing has changed."""
        self.successor_starts = True
        try:
            async with asyncio.timeout(COMMIT_SECONDS):
                reply = ControlReply(self._status(), sockets=tuple(takeover.sockets))
                _send_sockets(writer, msgspec.json.encode(reply) + b"\n", list(takeover.sockets.values()))
                line = await reader.readline()
                if not line or msgspec.json.decode(line, type=ControlRequest).action != "commit":
                    then = "going on" if self.takeover else "nobody accepts connections"
                    log.warning("the process that was to take over has ended before it was ready; %s", then)
                    return
                self.takeover = None
                takeover.commit(_peer(writer))
        finally:
            self.successor_starts = False

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
        if request.action in ("takeover", "commit"):
            raise ControlRefused(self._no_takeover())
        return ""

    def _no_takeover(self) -> str:
        if self.successor_starts:
            return "another process is taking over already"
        if self.takeover is not None:
            return self.takeover.refusal
        if self.controlled.command != "gateway":
            return (
                f"quantgate {self.controlled.command} owns replicas, which can't be taken over: stop it, and start it"
            )
        return "it is starting or stopping"

    def _status(self) -> ProcessStatus:
        controlled, clock = self.controlled, self.controlled.clock
        replicas = [
            ReplicaSummary(each.replica.id, each.state, each.reason, round(max(0.0, clock() - each.since_seconds), 1))
            for each in controlled.registry.snapshot()
        ]
        config = None if controlled.config is None else str(controlled.config.resolve())
        seconds = round(clock() - self._began, 1)
        addresses, reload = dict(controlled.addresses), self.last_reload()
        takeover = self.takeover is not None
        return ProcessStatus(controlled.command, os.getpid(), config, seconds, addresses, replicas, reload, takeover)


async def _send(writer: asyncio.StreamWriter, reply: ControlReply) -> None:
    writer.write(msgspec.json.encode(reply) + b"\n")
    await writer.drain()


def _send_sockets(writer: asyncio.StreamWriter, line: bytes, sockets: list[socket.socket]) -> None:
    """Send a line together with sockets; the transport's own socket can't, and nothing is buffered before."""
    with socket.socket(fileno=os.dup(writer.get_extra_info("socket").fileno())) as connection:
        sent = socket.send_fds(connection, [line], [each.fileno() for each in sockets])
    writer.write(line[sent:])


def _peer(writer: asyncio.StreamWriter) -> int:
    """Return the process number at the other end."""
    with socket.socket(fileno=os.dup(writer.get_extra_info("socket").fileno())) as connection:
        return peer_pid(connection)


def peer_pid(connection: socket.socket) -> int:
    """Return the number of the process at the other end of a Unix socket, see SO_PEERCRED in unix(7)."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid: int = struct.unpack("3i", credentials)[0]
    return pid


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
