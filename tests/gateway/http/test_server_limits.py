"""Bounds of the server (uploads and waiting bodies), and defects of a handler."""

import asyncio
import random
from contextlib import suppress
from dataclasses import replace

import httpx
import pytest

from gateway.errors import RequestError
from gateway.http.request import Request
from gateway.http.response_writer import ResponseWriter
from gateway.http.server import HttpServer, serve_clients
from gateway.http.sockets import address_of, bind
from tests.fakes.running import DEADLINE_SECONDS, eventually
from tests.gateway.http.echo_server import HASTY, HEAD, MEMORY_BYTES, Echo, Served, said, served
from tests.gateway.wire import connected

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_noise() -> None:
    """Whatever bytes come, in whatever pieces, nothing is left behind and nobody else is disturbed."""
    chance = random.Random(11)
    words = [
        *(
            b"GET /x HTTP/1.1\r\n",
            b"POST /y HTTP/1.1\r\n",
            b"host: a\r\n",
            b"\r\n",
            b"\n",
            b"\r",
            b"content-length: 3\r\n",
        ),
        *(
            b"transfer-encoding: chunked\r\n",
            b"3\r\nabc\r\n",
            b"0\r\n\r\n",
            b"\x00\xff",
            b"expect: 100-continue\r\n",
            b"x" * 40,
        ),
    ]

    async def noise(here: Served) -> None:
        async with connected(here.url) as peer:
            with suppress(ConnectionError):
                for _ in range(chance.randrange(1, 12)):
                    await peer.say(chance.choice(words))
                    if chance.random() < 0.2:
                        await asyncio.sleep(0)
                if chance.random() < 0.5:
                    peer.reset()

    async with served() as here:
        for _ in range(20):
            await asyncio.gather(*(noise(here) for _ in range(25)))
        async with httpx.AsyncClient(timeout=DEADLINE_SECONDS, trust_env=False) as client:
            assert (await client.get(f"{here.url}/z")).text == "GET /z 0"
        await eventually(lambda: here.front.reserved_bytes == 0 or None)


async def test_a_defect_of_the_site_ends_one_request() -> None:
    """The connection is told, and serves on."""

    class Defective(Echo):
        async def _answer(self, request: Request, reply: ResponseWriter) -> None:
            raise RequestError("not foreseen here") if request.path == b"/x" else ZeroDivisionError

    front = HttpServer(Defective(), MEMORY_BYTES)
    with bind("127.0.0.1:0", "test") as taken:
        async with (
            serve_clients(front, taken, 0),
            httpx.AsyncClient(
                base_url=f"http://{address_of(taken)}", timeout=DEADLINE_SECONDS, trust_env=False
            ) as client,
        ):
            for path in ("/x", "/y", "/x"):
                assert (await client.get(path)).status_code == 500


async def test_a_long_upload_is_refused_in_words() -> None:
    """A client writes all of it before it reads; the connection stays for as long as more comes, and closes then."""
    async with served() as here, httpx.AsyncClient(timeout=DEADLINE_SECONDS, trust_env=False) as client:
        answer = await client.post(f"{here.url}/x", content=b"x" * (40 * 2**20))
        assert (answer.status_code, answer.headers["x-code"]) == (413, "request_too_large")


async def test_a_refused_upload_has_an_end() -> None:
    """Whoever goes on writing, and slowly, is hung up on."""
    hasty = replace(HASTY, linger_seconds=DEADLINE_SECONDS, linger_total_seconds=0.1)
    async with served(hasty) as here, connected(here.url) as peer:
        await peer.say(HEAD + b"content-length: 999999999\r\n\r\n")
        await peer.read_until(b"request_too_large")
        with suppress(ConnectionError):
            async with asyncio.timeout(DEADLINE_SECONDS):
                while True:
                    await peer.say(b"x")
                    await asyncio.sleep(0.01)


async def test_whoever_asks_before_it_sends_is_refused_before_it_sends() -> None:
    """Also if its body would be short: it waits for a word before it sends it."""
    async with served() as here, connected(here.url) as peer:
        begun = HEAD.replace(b"/x", b"/secret") + b"content-length: 5\r\nexpect: 100-continue\r\n\r\n"
        assert (await said(peer, begun)).startswith(b"HTTP/1.1 401 ")


@pytest.mark.parametrize("begin", [b"0\r\nx: ", b"5;x="], ids=["a trailer", "an extension"])
async def test_what_a_chunked_body_has_beside_its_data_has_an_end(begin: bytes) -> None:
    """A head is bounded, and so is what comes in its stead behind it."""
    async with served() as here, connected(here.url) as peer:
        await peer.say(HEAD + b"transfer-encoding: chunked\r\n\r\n1\r\na\r\n" + begin)
        with suppress(ConnectionError):
            async with asyncio.timeout(DEADLINE_SECONDS):
                while not here.handler.started:
                    await peer.say(b"x" * 1000)
        assert (await peer.read_all()).startswith(b"HTTP/1.1 431 ")


async def test_a_body_in_many_small_pieces_is_no_long_head() -> None:
    """What is between the pieces adds up to more than a head may have."""
    async with served() as here, connected(here.url) as peer:
        await peer.say(HEAD + b"transfer-encoding: chunked\r\n\r\n")
        for _ in range(200):
            await peer.say(b"1;" + b"x" * 300 + b"\r\n")
            await peer.say(b"a\r\n")
        await peer.say(b"0\r\n\r\n")
        await peer.read_until(b"POST /x 200")


async def test_bodies_that_wait_behind_another_are_counted() -> None:
    """Requests in a row hold their own memory until each has been answered."""
    async with served() as here, connected(here.url) as peer:
        body = b"content-length: 1000\r\n\r\n" + b"x" * 1000
        wait = HEAD.replace(b"/x", b"/wait") + body
        await peer.say(HEAD + body + wait + HEAD + body)
        await peer.read_until(b"POST /x 1000")
        await eventually(lambda: here.handler.started[1:] or None)
        assert here.front.reserved_bytes == 2000
        here.handler.go.set()
        await peer.read_until(b"POST /x 1000")
        await eventually(lambda: here.front.reserved_bytes == 0 or None)


async def test_a_status_without_a_name() -> None:
    """An engine's proxy may answer with a number of its own; it has a status line all the same."""
    async with served() as here, connected(here.url) as peer:
        assert (await said(peer, b"GET /499 HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")).startswith(
            b"HTTP/1.1 499 \r\n"
        )
