"""Clients that end their own side of a connection: those that read on get their answers, those that left none."""

from dataclasses import replace

import pytest

from gateway.http.interfaces import ClientTimeouts
from tests.fakes.running import eventually
from tests.gateway.http.echo_server import HEAD, served
from tests.gateway.wire import connected

pytestmark = pytest.mark.asyncio(loop_scope="session")

QUICK = replace(ClientTimeouts(), linger_seconds=0.2)
GET = b"GET %b HTTP/1.1\r\nhost: a\r\n\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


async def test_a_half_closed_client_gets_its_answer() -> None:
    """However long it takes; then the connection is closed."""
    async with served(QUICK) as here, connected(here.url) as peer:
        await peer.say(GET % b"/wait")
        await eventually(lambda: here.handler.started or None)
        peer.half_close()
        assert await peer.read_until(b"\r\n\r\n") == CONTINUE
        here.handler.go.set()
        answer = await peer.read_all()
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
        assert answer.endswith(b"GET /wait 0")
        assert here.handler.left == []


async def test_all_that_it_has_asked_is_answered() -> None:
    """Requests in a row, and a stream; half a request behind them is not waited for."""
    async with served(QUICK) as here, connected(here.url) as peer:
        await peer.say(GET % b"/wait" + GET % b"/stream" + GET % b"/x" + HEAD)
        await eventually(lambda: here.handler.started or None)
        peer.half_close()
        await peer.read_until(CONTINUE)
        here.handler.go.set()
        answer = await peer.read_all()
        assert answer.count(b"HTTP/1.1 200 OK") == 3
        assert answer.endswith(b"GET /x 0")


async def test_a_client_of_http_1_0_has_a_moment() -> None:
    """It cannot be asked whether it is still there, so it gets what is ready soon."""
    async with served(QUICK) as here:
        async with connected(here.url) as peer:
            await peer.say(b"GET /x HTTP/1.0\r\n\r\n")
            peer.half_close()
            assert (await peer.read_all()).endswith(b"GET /x 0")
        async with connected(here.url) as peer:
            await peer.say(b"GET /wait HTTP/1.0\r\n\r\n")
            await eventually(lambda: here.front.busy or None)
            peer.half_close()
            assert await peer.read_all() == b""
            await eventually(lambda: here.handler.left == [b"/wait"] or None)


async def test_a_client_that_left_gets_none() -> None:
    """Whoever closes both sides has left: its kernel says so when the client is asked."""
    async with served(QUICK) as here, connected(here.url) as peer:
        await peer.say(GET % b"/wait")
        await eventually(lambda: here.handler.started or None)
        peer.finish()
        await eventually(lambda: here.handler.left == [b"/wait"] or None)


async def test_a_client_that_ends_its_side_within_a_request() -> None:
    """There is nothing to answer."""
    async with served(QUICK) as here, connected(here.url) as peer:
        await peer.say(HEAD + b"content-length: 5\r\n\r\nhel")
        await eventually(lambda: here.front.reserved_bytes or None)
        peer.half_close()
        assert await peer.read_all() == b""
        assert here.handler.started == []
