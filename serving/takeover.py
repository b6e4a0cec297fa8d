"""Takes the listening sockets of a running gateway over: the successor's side of `serving.control`.

The predecessor goes on until `commit`. Until then the connection tells it that this process is alive.
"""

import logging
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from serving.control import ControlReply, ControlRequest, short_path
from serving.control_client import ANSWER_SECONDS, ControlClient, running_processes
from serving.errors import NoAnswer, TakeoverRefused
from serving.replica import State

log = logging.getLogger(__name__)

MOST_SOCKETS = 253  # SCM_MAX_FD of Linux
LONGEST_LINE_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Predecessor:
    """A gateway that runs: its number, its listening sockets by name, and the replicas that were ready there."""

    pid: int
    sockets: Mapping[str, socket.socket]
    ready: frozenset[str]
    _connection: socket.socket

    def commit(self) -> None:
        """Let it accept no more connections, finish its requests and end; one that has ended already is no error."""
        try:
            _request(self._connection, "commit")
        except OSError as error:
            log.warning("process %d has ended by itself (%s)", self.pid, error.strerror)
        else:
            log.info("took over from process %d, which finishes its requests", self.pid)


@contextmanager
def predecessor_of(home: Path, config: Path) -> Iterator[Predecessor | None]:
    """Take the sockets of the gateway that runs with a configuration file; None if there is none in this home.

    When the block ends before `commit`, it goes on as if nothing had happened. Raises TakeoverRefused.
    """
    with running_processes(home) as processes, ExitStack() as stack:
        found = [process for process in processes if _can_be_taken_over(process, config)]
        if len(found) > 1:
            numbers = ", ".join(str(process.pid) for process in found)
            raise TakeoverRefused(f"the processes {numbers} are gateways of {config}; stop all but one of them")
        if not found:
            log.warning("no gateway of %s runs in %s: there is nothing to take over", config, home)
        yield stack.enter_context(_connected(found[0])) if found else None


def _can_be_taken_over(process: ControlClient, config: Path) -> bool:
    """Whether a process is a gateway of this configuration that serves; TakeoverRefused if it is `quantgate up`."""
    try:
        status = process.ask(ControlRequest("status")).status
    except NoAnswer as error:
        log.warning("%s", error)
        return False
    if status.config != str(config.resolve()):
        return False
    if status.command == "up":
        hint = "stop it and start it again, or run quantgate serve and quantgate gateway instead"
        raise TakeoverRefused(f"process {process.pid} is quantgate up, which owns its replicas: {hint}")
    return status.takeover


@contextmanager
def _connected(process: ControlClient) -> Iterator[Predecessor]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection, ExitStack() as stack:
        connection.settimeout(ANSWER_SECONDS)
        try:
            with short_path(process.path) as address:
                connection.connect(address)
            _request(connection, "takeover")
            reply, sockets = _read(connection)
        except (OSError, msgspec.DecodeError) as error:
            raise TakeoverRefused(f"process {process.pid} does not answer ({error})") from error
        for each in sockets:
            stack.enter_context(each)
        if reply.error or len(sockets) != len(reply.sockets):
            raise TakeoverRefused(f"process {process.pid} can't be taken over: {reply.error or 'sockets are missing'}")
        ready = frozenset(replica.id for replica in reply.status.replicas if replica.state == State.READY)
        yield Predecessor(process.pid, dict(zip(reply.sockets, sockets, strict=True)), ready, connection)


def _request(connection: socket.socket, action: str) -> None:
    connection.sendall(msgspec.json.encode({"action": action}) + b"\n")


def _read(connection: socket.socket) -> tuple[ControlReply, list[socket.socket]]:
    """Read a reply and the sockets that come with it."""
    line, sockets = b"", list[socket.socket]()
    while not line.endswith(b"\n"):
        data, descriptors, _, _ = socket.recv_fds(connection, LONGEST_LINE_BYTES, MOST_SOCKETS)
        for descriptor in descriptors:
            os.set_inheritable(descriptor, False)  # otherwise every child of this process would have it, too
            sockets.append(socket.socket(fileno=descriptor))
        if not data:
            raise ConnectionError("it closed the connection")
        line += data
    return msgspec.json.decode(line, type=ControlReply), sockets
