"""The server on the client port: its open connections, its memory for request bodies, and graceful shutdown."""

import asyncio
import math
import socket
import ssl
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from types import MappingProxyType

from gateway.http.acceptor import Acceptor
from gateway.http.connection import ClientConnection
from gateway.http.interfaces import ClientTimeouts, RequestHandler, ServerConnection
from gateway.http.limits import may_hold
from gateway.http.request import Request
from gateway.http.response_writer import DateHeader
from gateway.http.sockets import NextAcceptor

CANCEL_SECONDS = 1.0  # for cancelled requests to clean up
# How long an idle connection stays open for its next request while another process accepts. Until the next start new
# connections wait, so the drain must be short; httpx and undici do not use a connection that was idle for 5 s again.
IDLE_SECONDS: Mapping[NextAcceptor, float] = MappingProxyType({"next start": 5.0, "successor": math.inf})


class HttpServer:
    """Owns the connections of one port, and limits the memory that their request bodies take together.

    `on_client_aborted` gets a metric label for each client that the server disconnects.
    """

    def __init__(
        self,
        handler: RequestHandler,
        memory_bytes: int,
        timeouts: ClientTimeouts | None = None,
        on_client_aborted: Callable[[str], None] = lambda _reason: None,
    ) -> None:
        self.handler = handler
        self.timeouts = timeouts or ClientTimeouts()
        self.keep_alive_seconds = self.timeouts.keep_alive_seconds
        self.date_header = DateHeader()
        self._on_client_aborted = on_client_aborted
        self.memory_bytes = memory_bytes
        self.grace_seconds = 0.0
        self.draining = False
        self._reserved_bytes = 0
        self._owner_bytes: dict[str, int] = defaultdict(int)  # the part of them that each owner holds or held
        self._connections: set[ServerConnection] = set()
        self._idle_waiter: asyncio.Future[None] | None = None

    @property
    def busy(self) -> int:
        """Number of requests that are being answered."""
        return sum(connection.busy for connection in self._connections)

    @property
    def connections(self) -> int:
        """Number of open connections."""
        return len(self._connections)

    @property
    def reserved_bytes(self) -> int:
        """Memory that request bodies take now."""
        return self._reserved_bytes

    def on_client_aborted(self, reason: str) -> None:
        """Report a client that a connection aborted."""
        self._on_client_aborted(reason)

    def reserve(self, request: Request, size_bytes: int) -> bool:
        """Reserve memory for a piece of a request's body; False if there is none left for it."""
        owner, used_bytes = request.owner, self._reserved_bytes
        # With half of the memory free there is always enough: nobody holds more than that.
        if (used_bytes + size_bytes) * 2 > self.memory_bytes:
            owner_bytes = self._owner_bytes[owner] if owner else None
            if not may_hold(size_bytes, request.reserved_bytes, owner_bytes, used_bytes, self.memory_bytes):
                return False
        self._owner_bytes[owner] += size_bytes
        self._reserved_bytes = used_bytes + size_bytes
        request.reserved_bytes += size_bytes
        return True

    def release(self, request: Request) -> None:
        """Return all memory that a request has reserved, and its slot; idempotent."""
        if request.slot is not None:
            request.slot.release()
            request.slot = None
        size_bytes = request.reserved_bytes
        if not size_bytes:
            return
        request.reserved_bytes = 0
        self._reserved_bytes -= size_bytes
        self._owner_bytes[request.owner] -= size_bytes

    def register(self, connection: ServerConnection) -> None:
        """Add an open connection."""
        self._connections.add(connection)

    def unregister(self, connection: ServerConnection) -> None:
        """Remove a closed connection."""
        self._connections.discard(connection)
        self.notify_idle()

    def notify_idle(self) -> None:
        """Let a waiting `drain` check again whether requests are running."""
        if self._idle_waiter is not None and not self._idle_waiter.done():
            self._idle_waiter.set_result(None)

    async def drain(self, grace_seconds: float) -> None:
        """Shut down gracefully: wait for running requests, cancel those that remain, close every connection."""
        self.draining = True
        await self._wait_while(lambda: bool(self.busy), grace_seconds)
        await self._close_connections()

    async def hand_over(
        self, grace_seconds: float, keep_alive_seconds: float, opened: Callable[[float], Awaitable[None]]
    ) -> None:
        """Shut down where another process accepts new connections: requests on open connections are still answered.

        A connection closes with its next response, which says so (`connection: close`), or when it has been idle for
        `keep_alive_seconds`. If it were closed at once, a request that is on its way would be lost (RFC 9112, 9.3.1).
        `opened` waits, up to a limit, for the TLS handshakes of connections that are accepted, but not registered yet.
        """
        self.draining = True
        earlier_seconds = max(0.0, self.keep_alive_seconds - keep_alive_seconds)
        self.keep_alive_seconds -= earlier_seconds
        for connection in self._connections:
            connection.expire_earlier(earlier_seconds)
        loop = asyncio.get_running_loop()
        end_seconds = loop.time() + grace_seconds
        await opened(min(grace_seconds, keep_alive_seconds))
        await self._wait_while(lambda: bool(self._connections), end_seconds - loop.time())
        await self._close_connections()

    async def _close_connections(self) -> None:
        for connection in tuple(self._connections):
            connection.cancel()
        await self._wait_while(lambda: bool(self.busy), CANCEL_SECONDS)
        for connection in tuple(self._connections):
            connection.close()

    async def _wait_while(self, condition: Callable[[], bool], seconds: float) -> None:
        """Wait until a condition on the open connections is false, but no longer than `seconds`."""
        try:
            async with asyncio.timeout(seconds):
                while condition():
                    self._idle_waiter = asyncio.get_running_loop().create_future()
                    await self._idle_waiter
        except TimeoutError:
            pass


@asynccontextmanager
async def serve_clients(
    server: HttpServer,
    listening: socket.socket,
    grace_seconds: float,
    tls: ssl.SSLContext | None = None,
    next_acceptor: Callable[[], NextAcceptor] = lambda: "none",
) -> AsyncIterator[HttpServer]:
    """Accept connections on a listening socket; on exit, drain for `server.grace_seconds` and close the socket.

    Without a next acceptor the socket accepts until the drain is over, so the handler decides how new requests are
    refused meanwhile.
    """
    server.grace_seconds = grace_seconds
    async with Acceptor(
        listening, lambda: ClientConnection(server), tls, server.timeouts.head_seconds if tls else None
    ) as acceptor:
        try:
            yield server
        finally:
            following = next_acceptor()
            if following == "none":
                await server.drain(server.grace_seconds)
            else:
                acceptor.close()
                await server.hand_over(server.grace_seconds, IDLE_SECONDS[following], acceptor.opened)
