"""Asks the processes of a home directory through their control sockets."""

import os
import select
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from serving.control import FOLDER, ControlReply, ControlRequest, peer_pid, short_path
from serving.errors import NoAnswer

ANSWER_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class ControlClient:
    """One running process: its number, and a descriptor that becomes readable when it has ended (pidfd_open(2))."""

    path: Path
    pid: int
    descriptor: int

    def ask(self, request: ControlRequest) -> ControlReply:
        """Send a request; NoAnswer if no valid reply comes in time."""
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(ANSWER_SECONDS)
                with short_path(self.path) as address:
                    connection.connect(address)
                connection.sendall(msgspec.json.encode(request) + b"\n")
                with connection.makefile("rb") as lines:
                    return msgspec.json.decode(lines.readline(), type=ControlReply)
        except (OSError, msgspec.DecodeError) as error:
            raise NoAnswer(f"process {self.pid} does not answer ({error or type(error).__name__})") from error

    def ended_within(self, seconds: float) -> bool:
        """Wait until the process has ended; returns whether it has."""
        deadline = time.monotonic() + seconds
        watch = select.poll()
        watch.register(self.descriptor, select.POLLIN)
        while (left := deadline - time.monotonic()) > 0:
            if watch.poll(left * 1000):
                return True
        return bool(watch.poll(0))


@contextmanager
def running_processes(home: Path) -> Iterator[list[ControlClient]]:
    """Find the processes of a home that listen; sockets that a killed process left are removed."""
    clients: list[ControlClient] = []
    try:
        for path in sorted((home / FOLDER).glob("*.sock")):
            clients.extend(_connect(path))
        yield clients
    finally:
        for client in clients:
            os.close(client.descriptor)


def _connect(path: Path) -> tuple[ControlClient, ...]:
    """Take hold of the process behind a socket, if there is one."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(ANSWER_SECONDS)
        try:
            with short_path(path) as address:
                connection.connect(address)
            # The kernel names the process that listens; the one in the file's name may be of another container.
            pid = peer_pid(connection)
            return (ControlClient(path, pid, os.pidfd_open(pid)),)
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return ()
        except (OSError, ValueError):
            return ()
