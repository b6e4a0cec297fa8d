"""A server whose handler echoes."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from gateway.errors import InvalidKey
from gateway.http.interfaces import ClientTimeouts
from gateway.http.request import Request
from gateway.http.response_writer import ResponseWriter
from gateway.http.server import HttpServer, serve_clients
from gateway.http.sockets import address_of, bind
from tests.gateway.wire import Peer

LIMIT_BYTES = 300_000
MEMORY_BYTES = 400_000
HASTY = ClientTimeouts(
    head_seconds=0.1, body_silence_seconds=0.1, keep_alive_seconds=0.1, slow_reader_seconds=0.1, linger_seconds=0.1
)


@dataclass
class Echo:
    """A handler that says what it read; `/wait` waits, `/stream` streams, `/flood` streams without an end.

    `/head` tells headers and body. A request with the header `owner` belongs to that owner.
    """

    go: asyncio.Event = field(default_factory=asyncio.Event)
    started: list[bytes] = field(default_factory=list)
    left: list[bytes] = field(default_factory=list)

    def admit(self, request: Request) -> int:
        """Refuse whoever has no key for the secret."""
        if request.path == b"/secret":
            raise InvalidKey("no API key")
        if owner := request.headers.get(b"owner"):
            request.owner = owner.decode()
        return LIMIT_BYTES

    async def handle(self, request: Request, reply: ResponseWriter) -> None:
        """Answer, or tell the refusal."""
        self.started.append(request.path)
        if request.refusal is not None:
            reply.send(
                request.refusal.status, b"x-code: %b\r\n" % request.refusal.code.encode(), request.refusal.body()
            )
            return
        try:
            await self._answer(request, reply)
        except asyncio.CancelledError:
            self.left.append(request.path)
            raise

    async def _answer(self, request: Request, reply: ResponseWriter) -> None:
        if request.path == b"/wait":
            await self.go.wait()
        if request.path == b"/stream":
            reply.start(200, b"", b"one")
            reply.write(b"two")
            reply.end(b"three")
        elif request.path == b"/head":
            lines = [b"%b=%b\n" % item for item in sorted(request.headers.items())]
            reply.send(200, b"", b"".join(lines) + b"body=%b" % request.body)
        elif request.path == b"/499":
            reply.send(499, b"", b"")
        elif request.path == b"/flood":
            reply.start(200, b"")
            while True:
                reply.write(b"x" * 65536)
                await (reply.drain() if reply.write_paused else asyncio.sleep(0))
        else:
            reply.send(200, b"", b"%b %b %d" % (request.method, request.target, len(request.body)))

    def on_internal_error(self, request: Request, reply: ResponseWriter) -> None:
        """Tell that it failed."""
        if not reply.started:
            reply.send(500, b"", b"failed")


@dataclass(frozen=True)
class Served:
    """A front that listens, and its handler."""

    url: str
    front: HttpServer
    handler: Echo


@asynccontextmanager
async def served(timeouts: ClientTimeouts | None = None) -> AsyncIterator[Served]:
    """A front on a port of its own; afterwards it holds nothing any more."""
    handler, aborted = Echo(), list[str]()
    front = HttpServer(handler, MEMORY_BYTES, timeouts, aborted.append)
    with bind("127.0.0.1:0", "test") as taken:
        async with serve_clients(front, taken, 0):
            yield Served(f"http://{address_of(taken)}", front, handler)
    assert (front.busy, front.reserved_bytes) == (0, 0)


HEAD = b"POST /x HTTP/1.1\r\nhost: a\r\n"


async def said(peer: Peer, data: bytes) -> bytes:
    """What comes back for some bytes, up to the end of the connection."""
    await peer.say(data)
    return await peer.read_all()
