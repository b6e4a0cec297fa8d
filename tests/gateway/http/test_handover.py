"""The connections of a server that shuts down while another process accepts new ones."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from gateway.http.interfaces import ClientTimeouts
from gateway.http.server import HttpServer, serve_clients
from gateway.http.sockets import NextAcceptor, address_of, bind
from tests.fakes.certificates import Authority
from tests.fakes.running import DEADLINE_SECONDS, HOST, eventually
from tests.gateway.http.echo_server import MEMORY_BYTES, Echo
from tests.gateway.wire import HEAD_END, connected

pytestmark = pytest.mark.asyncio(loop_scope="session")

GET, WAIT = (b"GET %b HTTP/1.1\r\nhost: a\r\n\r\n" % path for path in (b"/x", b"/wait"))
CLOSE = b"\r\nconnection: close\r\n"


@dataclass
class Replaced:
    """A server that shuts down when `stop` is set."""

    url: str
    server: HttpServer
    handler: Echo = field(default_factory=Echo)
    stop: asyncio.Event = field(default_factory=asyncio.Event)

    async def drain(self) -> None:
        """Let it shut down; returns when it does."""
        self.stop.set()
        await eventually(lambda: self.server.draining)


@asynccontextmanager
async def replaced(
    next_acceptor: NextAcceptor = "successor",
    timeouts: ClientTimeouts | None = None,
    tls: ssl.SSLContext | None = None,
) -> AsyncIterator[Replaced]:
    """A server whose socket is kept open; it has shut down on exit."""
    handler = Echo()
    server = HttpServer(handler, MEMORY_BYTES, timeouts)
    with bind(f"{HOST}:0", "test") as kept:
        made = Replaced(f"http://{address_of(kept)}", server, handler)

        async def serve() -> None:
            with kept.dup() as taken:
                async with serve_clients(server, taken, DEADLINE_SECONDS, tls, lambda: next_acceptor):
                    await made.stop.wait()

        task = asyncio.create_task(serve())
        try:
            yield made
        finally:
            made.stop.set()
            handler.go.set()
            async with asyncio.timeout(2 * DEADLINE_SECONDS):
                await task
    assert server.connections == 0


async def test_an_idle_connection_has_one_more_response() -> None:
    """It says that the connection closes, and it does."""
    async with replaced() as made, connected(made.url) as peer:
        await peer.say(GET)
        assert CLOSE not in await peer.read_until(HEAD_END)
        await peer.read_until(b"/x 0")
        await made.drain()
        await peer.say(GET)
        response = await peer.read_all()
        assert CLOSE in response
        assert response.endswith(b"/x 0")


async def test_pipelined_requests_are_answered() -> None:
    """Only the last response closes the connection."""
    async with replaced() as made, connected(made.url) as peer:
        await peer.say(WAIT + GET + GET)
        await eventually(lambda: made.handler.started)
        await made.drain()
        made.handler.go.set()
        response = await peer.read_all()
        assert (response.count(b"HTTP/1.1 200 "), response.count(CLOSE)) == (3, 1)


async def test_a_connection_without_a_request() -> None:
    """Until the next start it is closed when it has been idle for 5 s, as new connections wait meanwhile."""
    async with replaced("next start", ClientTimeouts(linger_seconds=0.2)) as made, connected(made.url) as peer:
        await eventually(lambda: made.server.connections)
        await made.drain()
        assert await peer.read_all() == b""


async def test_a_new_connection_waits() -> None:
    """The server does not accept it: it is for the process that accepts next."""
    async with replaced() as made, connected(made.url) as first:
        await first.say(WAIT)
        await eventually(lambda: made.handler.started)
        await made.drain()
        async with connected(made.url) as second:
            await second.say(GET)
            made.handler.go.set()
            await first.read_until(b"/wait 0")
            assert (made.server.connections, made.handler.started) == (1, [b"/wait"])


async def test_a_handshake_that_has_not_begun(tmp_path: Path) -> None:
    """It takes place after the server has stopped accepting, within the grace time, and the request is answered."""
    authority = Authority(tmp_path, "ca")
    trust = ssl.create_default_context(cafile=authority.file)
    async with replaced(tls=authority.issue().server_context()) as made:
        host, _, port = made.url.removeprefix("http://").rpartition(":")
        early = socket.create_connection((host, int(port)))
        # Connections are accepted in the order in which they came.
        _, later = await asyncio.open_connection(host, int(port), ssl=trust)
        later.transport.abort()
        await eventually(lambda: not made.server.connections)
        await made.drain()
        reader, writer = await asyncio.open_connection(sock=early, ssl=trust, server_hostname=HOST)
        writer.write(GET)
        assert (await reader.read()).endswith(b"/x 0")
        writer.close()
