"""Connections to a scripted replica."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from gateway.proxy.upstream.connection import Connection
from gateway.routing.target import Timeouts
from tests.fakes.running import DEADLINE_SECONDS
from tests.gateway.wire import Behaviour, scripted

REQUEST = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}"
LIMIT = 2**20
LONG = b"x" * 300_000
HASTY = Timeouts(0.05, 0.05, DEADLINE_SECONDS)
PATIENT = Timeouts(DEADLINE_SECONDS, DEADLINE_SECONDS, 2 * DEADLINE_SECONDS)


@asynccontextmanager
async def connection_to(behaviour: Behaviour) -> AsyncIterator[Connection]:
    """Connect to a replica with a behaviour."""
    async with scripted(behaviour) as replica:
        host, _, port = replica.url.removeprefix("http://").rpartition(":")
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(Connection, host, int(port))
        try:
            yield connection
        finally:
            connection.close()


async def reply(connection: Connection, timeouts: Timeouts = PATIENT) -> tuple[int, bytes]:
    """Send a request, and read the whole reply."""
    connection.send(REQUEST, timeouts)
    await connection.head()
    return connection.status, await connection.read(LIMIT)


async def next_piece(connection: Connection) -> bytes:
    """Wait for more of the body, as `flow` gives it to a feed that is full after each piece; b"" at its end."""
    pieces: list[bytes] = []

    def feed(data: bytes) -> bool:
        pieces.append(data)
        return False

    assert await connection.flow(feed) is not bool(pieces)
    return b"".join(pieces)


CLOSING = b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n"
