"""Connections to replicas, kept for the next request while they are fresh."""

import asyncio
import ssl
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from gateway.errors import UpstreamDisconnected, UpstreamUnreachable
from gateway.proxy.upstream.connection import Connection
from gateway.proxy.upstream.timer import Timeouts
from serving.address import Address, address_of
from serving.tls import Tls

# vLLM closes idle connections after 5 s unless told otherwise.
IDLE_SECONDS = 4.0
CONNECT_SECONDS = 2.0
NO_TIMEOUTS = Timeouts()

_Idle = deque[tuple[float, Connection]]
_Place = tuple[str, Tls | None]  # the url of a replica, and what it has to prove


@dataclass(slots=True)
class Pool:
    """Owns every upstream connection; `exchange` hands one out and takes it back."""

    idle_seconds: float = IDLE_SECONDS
    trust: ssl.SSLContext | None = None  # for https; None: what the machine trusts, read when it is first needed
    clock: Callable[[], float] = time.monotonic
    _idle: dict[_Place, _Idle] = field(default_factory=dict)
    _addresses: dict[str, Address] = field(default_factory=dict)

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
        return f"<Pool [{', '.join(f'{url}: {len(idle)} idle' for (url, _), idle in self._idle.items())}]>"

    def exchange(
        self,
        url: str,
        request: bytes,
        deadlines: Timeouts = NO_TIMEOUTS,
        connect_seconds: float = CONNECT_SECONDS,
        tls: Tls | None = None,
    ) -> "Exchange":
        """Send a request and wait for the reply's head, for an `async with` block."""
        return Exchange(self, (url, tls), request, deadlines, connect_seconds)

    def address(self, url: str) -> Address:
        """Where a url leads."""
        known = self._addresses.get(url)
        if known is None:
            known = self._addresses[url] = address_of(url)
        return known

    def fresh(self, place: _Place) -> Connection | None:
        """Take the youngest idle connection; None if there is none that is surely open."""
        idle = self._idle.get(place)
        while idle:
            since, connection = idle.pop()
            if connection.reusable and self.clock() - since < self.idle_seconds:
                return connection
            connection.close()
        return None

    def keep(self, place: _Place, connection: Connection) -> None:
        """Lay a connection aside, and throw away those at the other end that nobody needed in time."""
        idle = self._idle.get(place)
        if idle is None:
            idle = self._idle[place] = deque()
        now = self.clock()
        while idle and now - idle[0][0] >= self.idle_seconds:
            idle.popleft()[1].close()
        idle.append((now, connection))

    def drop(self, url: str, tls: Tls | None = None) -> None:
        """Close what lies idle for a replica that nobody will ask soon."""
        for _, connection in self._idle.pop((url, tls), ()):
            connection.close()

    async def connect(self, place: _Place, seconds: float) -> Connection:
        """Open a connection; UpstreamUnreachable if there is none in time."""
        url, tls = place
        address = self.address(url)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(seconds):
                if address.path:
                    _, connection = await loop.create_unix_connection(Connection, address.path)
                else:
                    secure = self._trusted(tls) if address.secure else None
                    _, connection = await loop.create_connection(Connection, address.host, address.port, ssl=secure)
        except (OSError, TimeoutError) as error:
            raise UpstreamUnreachable("no connection to a replica") from error
        return connection

    def _trusted(self, tls: Tls | None) -> ssl.SSLContext:
        """One context for all connections: to read the machine's certificates takes tens of milliseconds."""
        if tls is not None:
            return tls.context
        if self.trust is None:
            self.trust = ssl.create_default_context()
        return self.trust


@dataclass(slots=True)
class Exchange:
    """One request on a connection, which is closed afterwards unless the reply was read to its end."""

    pool: Pool
    place: _Place
    request: bytes
    deadlines: Timeouts
    connect_seconds: float
    _connection: Connection | None = None

    async def __aenter__(self) -> Connection:
        """Give the connection with the reply's head read."""
        connection = self.pool.fresh(self.place)
        if connection is not None:
            try:
                return await self._sent(connection)
            except UpstreamDisconnected:
                # It closed while it lay idle: without a byte of an answer, asking again is safe. Once: a replica
                # that hangs up on this very request must not get it from every connection that lies here.
                if connection.received_bytes:
                    raise
        return await self._sent(await self.pool.connect(self.place, self.connect_seconds))

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        connection = self._connection
        if connection is None:
            return
        if connection.reusable:
            self.pool.keep(self.place, connection)
        else:
            connection.close()

    async def _sent(self, connection: Connection) -> Connection:
        try:
            connection.send(self.request, self.deadlines)
            await connection.head()
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        return connection
