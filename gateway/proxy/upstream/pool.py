"""Connections to replicas, kept open for the next request."""

import asyncio
import ssl
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from math import inf
from types import TracebackType
from typing import Self

from gateway.errors import ReplicaHung, UpstreamDisconnected, UpstreamUnreachable
from gateway.proxy.upstream.connection import Connection
from gateway.proxy.upstream.timer import DEFAULT_TIMEOUTS
from gateway.routing.target import Timeouts
from serving.address import Address, address_of
from serving.tls import Tls

# vLLM closes idle connections after 5 s unless configured otherwise.
IDLE_SECONDS = 4.0

Origin = tuple[str, Tls | None]  # the url of a replica, and the TLS settings that it must satisfy
_Idle = deque[tuple[float, Connection]]


@dataclass(slots=True)
class Pool:
    """Owns every upstream connection; `open` acquires one, and the end of its `with` block releases it."""

    idle_seconds: float = IDLE_SECONDS
    trust: ssl.SSLContext | None = None  # for https; None: the system's CA bundle, loaded when it is first needed
    clock: Callable[[], float] = time.monotonic
    _idle: dict[Origin, _Idle] = field(default_factory=dict)
    _open: dict[Origin, set[Connection]] = field(default_factory=dict)  # idle or not
    _heard_at: dict[Origin, float] = field(default_factory=dict)  # by connections that have closed
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

    async def open(
        self, url: str, request: bytes, timeouts: Timeouts = DEFAULT_TIMEOUTS, tls: Tls | None = None
    ) -> Connection:
        """Send a request and wait for the head of the reply; use the connection in a `with` block.

        It is kept for the next request if the reply was read to its end, and closed otherwise.
        """
        origin = (url, tls)
        connection = self.acquire(origin)
        if connection is not None:
            try:
                connection.send(request, timeouts)
                await connection.head()
            except UpstreamDisconnected:
                # It closed while it was idle: without a byte of a reply, sending again is safe. Once: a replica that
                # closes because of this very request must not get it on every idle connection.
                if connection.received_bytes:
                    raise
            else:
                return connection
        connection = await self.connect(origin, timeouts.connect_seconds)
        connection.send(request, timeouts)
        await connection.head()
        return connection

    def address(self, url: str) -> Address:
        """Parse the url of a replica, once."""
        address = self._addresses.get(url)
        if address is None:
            address = self._addresses[url] = address_of(url)
        return address

    def acquire(self, origin: Origin) -> Connection | None:
        """Take the youngest idle connection; None if none is surely open."""
        idle = self._idle.get(origin)
        while idle:
            since, connection = idle.pop()
            if connection.reusable and self.clock() - since < self.idle_seconds:
                return connection
            connection.close()
        return None

    def release(self, origin: Origin, connection: Connection) -> None:
        """Keep an idle connection, and close those that were idle for too long."""
        idle = self._idle.get(origin)
        if idle is None:
            idle = self._idle[origin] = deque()
        now = self.clock()
        while idle and now - idle[0][0] >= self.idle_seconds:
            idle.popleft()[1].close()
        idle.append((now, connection))

    def heard_at(self, url: str, tls: Tls | None = None) -> float:
        """When the last piece of a body came from a replica (monotonic); -inf if none has."""
        origin = (url, tls)
        heard = [connection.heard_at for connection in self._open.get(origin, ())]
        return max([self._heard_at.get(origin, -inf), *heard])

    def abandon(self, url: str, tls: Tls | None, silent_seconds: float) -> None:
        """End those exchanges with a replica that have received nothing for so long."""
        for connection in tuple(self._open.get((url, tls), ())):
            connection.abandon(silent_seconds, ReplicaHung("a replica hangs: it sends nothing any more"))

    def drop(self, url: str, tls: Tls | None = None) -> None:
        """Close the idle connections of a replica that has left."""
        for _, connection in self._idle.pop((url, tls), ()):
            connection.close()

    async def connect(self, origin: Origin, seconds: float) -> Connection:
        """Open a connection; UpstreamUnreachable if that fails or takes too long."""
        url, tls = origin
        address = self.address(url)
        loop = asyncio.get_running_loop()

        def protocol() -> Connection:
            return Connection(partial(self.release, origin), partial(self._lost, origin))

        try:
            async with asyncio.timeout(seconds):
                if address.path:
                    _, connection = await loop.create_unix_connection(protocol, address.path)
                else:
                    secure = self._tls_context(tls) if address.secure else None
                    _, connection = await loop.create_connection(protocol, address.host, address.port, ssl=secure)
        except (OSError, TimeoutError) as error:
            raise UpstreamUnreachable("no connection to a replica") from error
        self._open.setdefault(origin, set()).add(connection)
        return connection

    def _lost(self, origin: Origin, connection: Connection) -> None:
        connections = self._open.get(origin)
        if connections is None:
            return
        connections.discard(connection)
        if connections:
            self._heard_at[origin] = max(self._heard_at.get(origin, -inf), connection.heard_at)
        else:
            # A replica without a connection has no exchange that could be silent.
            del self._open[origin]
            self._heard_at.pop(origin, None)

    def _tls_context(self, tls: Tls | None) -> ssl.SSLContext:
        if tls is not None:
            return tls.context
        if self.trust is None:
            # One for all connections: loading the CA bundle takes tens of milliseconds.
            self.trust = ssl.create_default_context()
        return self.trust
