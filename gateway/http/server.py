"""The clients' port: who is connected, who is being answered, and how that ends."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from gateway.http.connection import ClientConnection
from gateway.http.interfaces import ClientTimeouts, RequestHandler, ServerConnection
from gateway.http.request import Request
from gateway.http.response_writer import DateHeader


class HttpServer:
    """Owns the connections of one port; counts the memory that bodies take in all of them."""

    def __init__(
        self,
        handler: RequestHandler,
        memory_bytes: int,
        timeouts: ClientTimeouts | None = None,
        on_client_aborted: Callable[[str], None] = lambda _reason: None,
    ) -> None:
        self.handler = handler
        self.timeouts = timeouts or ClientTimeouts()
        self.clock = DateHeader()
        self._on_client_aborted = on_client_aborted
        self.memory_bytes = memory_bytes
        self.draining = False
        self._held_bytes = 0
        self._connections: set[ServerConnection] = set()
        self._idle: asyncio.Future[None] | None = None

    @property
    def busy(self) -> int:
        """How many requests are being answered."""
        return sum(connection.busy for connection in self._connections)

    @property
    def reserved_bytes(self) -> int:
        """What bodies take now."""
        return self._held_bytes

    def on_client_aborted(self, reason: str) -> None:
        """Tell that a client was cut off."""
        self._on_client_aborted(reason)

    def reserve(self, request: Request, size_bytes: int) -> bool:
        """Take memory for a piece of a request's body, if there is some left."""
        if self._held_bytes + size_bytes > self.memory_bytes:
            return False
        self._held_bytes += size_bytes
        request.reserved_bytes += size_bytes
        return True

    def release(self, request: Request) -> None:
        """Give back what a request holds."""
        self._held_bytes -= request.reserved_bytes
        request.reserved_bytes = 0

    def register(self, connection: ServerConnection) -> None:
        """Count a connection in."""
        self._connections.add(connection)

    def unregister(self, connection: ServerConnection) -> None:
        """Count it out."""
        self._connections.discard(connection)
        self.notify_idle()

    def notify_idle(self) -> None:
        """A request has ended: whoever waits for the last one may look."""
        if self._idle is not None and not self._idle.done():
            self._idle.set_result(None)

    async def drain(self, grace_seconds: float) -> None:
        """Let running requests end; those that don't in time are ended, and every connection is closed."""
        self.draining = True
        await self._until_idle(grace_seconds)
        for connection in tuple(self._connections):
            connection.cancel()
        await self._until_idle(1.0)
        for connection in tuple(self._connections):
            connection.close()

    async def _until_idle(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                while self.busy:
                    self._idle = asyncio.get_running_loop().create_future()
                    await self._idle
        except TimeoutError:
            pass


@asynccontextmanager
async def serving_clients(
    front: HttpServer, listening: socket.socket, grace_seconds: float
) -> AsyncIterator[HttpServer]:
    """Serve clients on a socket; at the end, running requests may finish for a while, and new ones are refused."""
    server = await asyncio.get_running_loop().create_server(lambda: ClientConnection(front), sock=listening)
    try:
        yield front
    finally:
        await front.drain(grace_seconds)
        server.close()
        await server.wait_closed()
