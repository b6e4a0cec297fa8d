"""Connections to replicas, kept for the next request while they are fresh."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from gateway.errors import UpstreamDisconnected, UpstreamUnreachable
from gateway.relay.connection import Connection


@dataclass(frozen=True, slots=True)
class Patience:
    """How long the data path waits; vLLM closes idle connections after 5 s unless told otherwise."""

    connect_seconds: float = 2.0
    silence_seconds: float = 600.0
    idle_seconds: float = 4.0


@dataclass(slots=True)
class Pool:
    """Owns every upstream connection; `exchange` hands one out and takes it back."""

    patience: Patience = field(default_factory=Patience)
    clock: Callable[[], float] = time.monotonic
    _idle: dict[str, deque[tuple[float, Connection]]] = field(default_factory=dict)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for idle in self._idle.values():
            for _, connection in idle:
                connection.close()
        self._idle.clear()

    def __repr__(self) -> str:
        return f"<Pool [{', '.join(f'{url}: {len(idle)} idle' for url, idle in self._idle.items())}]>"

    @asynccontextmanager
    async def exchange(self, url: str, request: bytes) -> AsyncIterator[Connection]:
        """Send a request; yields the connection with the reply's head read.

        Closed afterwards unless the reply was read to its end and the replica keeps it open.
        """
        connection = await self._answering(url, request)
        try:
            yield connection
        finally:
            if connection.reusable:
                self._keep(url, connection)
            else:
                connection.close()

    async def _answering(self, url: str, request: bytes) -> Connection:
        connection = self._fresh(url)
        if connection is not None:
            try:
                return await _sent(connection, request)
            except UpstreamDisconnected:
                # It closed while it lay idle: without a byte of an answer, asking again is safe. Once: a replica
                # that hangs up on this very request must not get it from every connection that lies here.
                if connection.received_bytes:
                    raise
        return await _sent(await self._connect(url), request)

    def _fresh(self, url: str) -> Connection | None:
        idle = self._idle.get(url, deque())
        while idle:
            since, connection = idle.pop()
            if connection.reusable and self.clock() - since < self.patience.idle_seconds:
                return connection
            connection.close()
        return None

    def _keep(self, url: str, connection: Connection) -> None:
        """Lay a connection aside, and throw away those at the other end that nobody needed in time."""
        idle = self._idle.setdefault(url, deque())
        now = self.clock()
        while idle and now - idle[0][0] >= self.patience.idle_seconds:
            idle.popleft()[1].close()
        idle.append((now, connection))

    async def _connect(self, url: str) -> Connection:
        parts = urlsplit(url)
        secure = parts.scheme == "https"
        port = parts.port or (443 if secure else 80)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self.patience.connect_seconds):
                _, connection = await loop.create_connection(
                    lambda: Connection(self.patience.silence_seconds), parts.hostname or "", port, ssl=secure or None
                )
        except (OSError, TimeoutError) as error:
            raise UpstreamUnreachable("no connection to a replica") from error
        return connection


async def _sent(connection: Connection, request: bytes) -> Connection:
    try:
        connection.send(request)
        await connection.head()
    except BaseException:
        connection.close()
        raise
    return connection
