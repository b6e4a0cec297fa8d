"""Accepts the connections of a listening socket.

The servers of asyncio and libuv accept all connections that wait in one turn of the event loop. Where several workers
share a socket, the first one that wakes up gets a burst for itself: of 64 connections at once, one of two workers had
55, and keeps them for as long as they are open. So an acceptor takes a few in each turn, and the others take theirs.
"""

import asyncio
import errno
import logging
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

log = logging.getLogger(__name__)

# More than one, so that a burst does not take as many turns as it has connections.
CONNECTIONS_PER_TURN = 2
# Until descriptors or memory may be free again.
EXHAUSTED_SECONDS = 0.5
# For a client to end its direction of a TLS connection, too; one that reads nothing never does.
TLS_SHUTDOWN_SECONDS = 1.0
EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


@dataclass(slots=True, eq=False)
class Acceptor:
    """Accepts while the `async with` block runs, or until `close`.

    `protocol` is called for each connection. With `tls`, a handshake may take `handshake_seconds`.
    """

    listening: socket.socket
    protocol: Callable[[], asyncio.Protocol]
    tls: ssl.SSLContext | None = None
    handshake_seconds: float | None = None
    _loop: asyncio.AbstractEventLoop = field(init=False)
    _opening: set[asyncio.Task[None]] = field(default_factory=set)
    _retry: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Self:
        """Begin to accept."""
        self._loop = asyncio.get_running_loop()
        self.listening.setblocking(False)
        self._loop.add_reader(self.listening, self._accept)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Accept no more; connections whose handshake is not complete are closed."""
        self.close()
        for task in self._opening:
            task.cancel()
        await asyncio.gather(*self._opening, return_exceptions=True)

    def close(self) -> None:
        """Close the socket; connections that wait are reset unless another process has it open. Idempotent."""
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        if self.listening.fileno() >= 0:
            self._loop.remove_reader(self.listening)
            self.listening.close()

    async def opened(self, limit_seconds: float) -> None:
        """Wait until every accepted connection has its protocol, TLS handshakes included, or until the limit."""
        if self._opening:
            await asyncio.wait(self._opening, timeout=limit_seconds)

    def _accept(self) -> None:
        for _ in range(CONNECTIONS_PER_TURN):
            try:
                connection, _address = self.listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in EXHAUSTED:
                    raise
                self._pause(error)
                return
            task = self._loop.create_task(self._open(connection), name="open a connection")
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)

    async def _open(self, connection: socket.socket) -> None:
        try:
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await self._loop.connect_accepted_socket(
                self.protocol,
                connection,
                ssl=self.tls,
                ssl_handshake_timeout=self.handshake_seconds,
                ssl_shutdown_timeout=TLS_SHUTDOWN_SECONDS if self.tls else None,
            )
        except OSError as error:  # the client has left, or its TLS handshake has failed
            log.debug("a connection was not opened: %s", error)
            connection.close()

    def _pause(self, error: OSError) -> None:
        """Accept nothing for a while: the connection stays in the queue, and the socket readable."""
        log.error("no connection can be accepted: %s; trying again in %g s", error.strerror, EXHAUSTED_SECONDS)
        self._loop.remove_reader(self.listening)
        self._retry = self._loop.call_later(EXHAUSTED_SECONDS, self._loop.add_reader, self.listening, self._accept)
