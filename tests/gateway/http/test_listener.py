"""Ports: taken early, told clearly, given back."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import httpx
import pytest
from fastapi import FastAPI
from fastapi.responses import StreamingResponse

from config.errors import ConfigError
from gateway.http.interfaces import ClientTimeouts
from gateway.http.listener import listen
from gateway.http.sockets import address_of, bind
from tests.fakes.running import DEADLINE_SECONDS, eventually
from tests.gateway.wire import connected

pytestmark = pytest.mark.asyncio(loop_scope="session")

GET = b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n"


@pytest.mark.parametrize("address", ["127.0.0.1:0", "localhost:0", "[::1]:0"])
async def test_an_address(address: str) -> None:
    """IPv4, IPv6 and a name are served, and the real port is told."""
    app = FastAPI()

    @app.get("/")
    async def hello() -> str:
        return "hello"

    with bind(address, "gateway.listen") as taken:
        where = address_of(taken)
        assert not where.endswith(":0")
        assert where.startswith("[::1]:" if "::" in address else "127.0.0.1:")
        async with (
            listen(app, taken),
            httpx.AsyncClient(base_url=f"http://{where}", timeout=DEADLINE_SECONDS, trust_env=False) as client,
        ):
            answer = await client.get("/")
            assert (answer.json(), "server" in answer.headers) == ("hello", False)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((where.rpartition(":")[0].strip("[]"), int(where.rpartition(":")[2])))


async def test_a_port_in_use() -> None:
    """A port that somebody else has, is told with the option that names it, even before a server runs there."""
    with bind("127.0.0.1:0", "gateway.listen") as taken:
        address = address_of(taken)
        with pytest.raises(ConfigError) as caught:
            bind(address, "gateway.admin")
    assert str(caught.value) == (
        f"gateway.admin: can't listen on {address}: Address already in use; free the port or change gateway.admin"
    )


@pytest.mark.parametrize("address", ["192.0.2.1:8000", "no-such-host.invalid:8000"])
async def test_an_address_of_somebody_else(address: str) -> None:
    """An address that this machine doesn't have is told, too."""
    with pytest.raises(ConfigError, match=f"gateway.listen: can't listen on {address}: "):
        bind(address, "gateway.listen")


async def test_a_port_is_free_again_at_once() -> None:
    """A gateway that ended can start again on its port, though connections of its past are still known."""
    with bind("127.0.0.1:0", "gateway.listen") as taken:
        address = address_of(taken)
        with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as client:
            accepted, _ = taken.accept()
            accepted.close()
            assert client.recv(1) == b""
    bind(address, "gateway.listen").close()


@asynccontextmanager
async def endless(timeouts: ClientTimeouts | None = None) -> AsyncIterator[tuple[str, list[str]]]:
    """An app whose response has no end; its address, and a list with an entry for each that has ended."""
    ended: list[str] = []

    async def pieces() -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"x" * 2**16
                await asyncio.sleep(0)
        finally:
            ended.append("ended")

    app = FastAPI()

    @app.get("/")
    async def stream() -> StreamingResponse:
        return StreamingResponse(pieces())

    with bind("127.0.0.1:0", "test") as taken:
        async with listen(app, taken, timeouts):
            yield address_of(taken), ended


async def test_a_reader_that_does_not_read() -> None:
    """Its connection is aborted after slow_reader_seconds, and the app learns of it."""
    async with endless(ClientTimeouts(slow_reader_seconds=0.2)) as (address, ended), connected(address) as peer:
        await peer.say(GET)
        assert await eventually(lambda: ended)
        assert not (await peer.read_all()).endswith(b"0\r\n\r\n")


async def test_a_reader_that_reads_slowly() -> None:
    """Who reads on has time again."""
    async with endless(ClientTimeouts(slow_reader_seconds=1.5)) as (address, ended), connected(address) as peer:
        await peer.say(GET)
        until = time.monotonic() + 3.5
        while time.monotonic() < until:
            assert await peer.read_some()
        assert not ended


async def test_readers_do_not_hold_up_the_end(caplog: pytest.LogCaptureFixture) -> None:
    """Requests that have no end, read or not, have GRACE_SECONDS."""
    async with AsyncExitStack() as peers:
        async with endless() as (address, ended):
            for _ in range(2):
                peer = await peers.enter_async_context(connected(address))
                await peer.say(GET)
                await peer.read_until(b"xxx")
            began = time.monotonic()
        assert time.monotonic() - began < 20
        assert ended == ["ended"] * 2
        assert not [record for record in caplog.records if record.exc_info]
