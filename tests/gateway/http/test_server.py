"""The clients' side of the wire, over real sockets: what is read, what is refused, and how a connection ends."""

import asyncio
from contextlib import suppress

import httpx
import pytest

from gateway.http.limits import HEADER_LIMIT
from tests.fakes.running import DEADLINE_SECONDS, eventually
from tests.gateway.http.echo_server import HASTY, HEAD, said, served
from tests.gateway.wire import Peer, connected

pytestmark = pytest.mark.asyncio(loop_scope="session")


@pytest.mark.parametrize(
    "request_bytes, status, code",
    [
        (HEAD + b"content-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", 400, b"invalid_request"),
        (HEAD + b"content-length: 3\r\ncontent-length: 4\r\n\r\nabc", 400, b"invalid_request"),
        (HEAD + b"content-length: 3\r\ncontent-length: 3\r\n\r\nabc", 400, b"invalid_request"),
        (HEAD + b"content-length: -1\r\n\r\n", 400, b"invalid_request"),
        (HEAD + b"content-length: 1e3\r\n\r\n", 400, b"invalid_request"),
        (HEAD + b"content-length: 99999999999999999999999\r\n\r\n", 400, b"invalid_request"),
        (HEAD + b"transfer-encoding: xchunked\r\n\r\n0\r\n\r\n", 400, b"invalid_request"),
        (HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n", 400, b"invalid_request"),
        (HEAD + b"transfer-encoding: chunked\r\n\r\nffffffffffffffffff\r\n", 400, b"invalid_request"),
        (HEAD.replace(b"\r\n", b"\n") + b"\n", 400, b"invalid_request"),
        (HEAD + b"x: a\r\n b\r\n\r\n", 400, b"invalid_request"),
        (HEAD + b"x : a\r\n\r\n", 400, b"invalid_request"),
        (HEAD + b"x: \x01\r\n\r\n", 400, b"invalid_request"),
        (HEAD + b"host: b\r\n\r\n", 400, b"invalid_request"),
        (HEAD + b"authorization: Bearer a\r\nauthorization: Bearer b\r\n\r\n", 400, b"invalid_request"),
        (b"POST /x HTTP/1.1\r\n\r\n", 400, b"invalid_request"),
        (b"GET /x HTTP/2.0\r\nhost: a\r\n\r\n", 400, b"invalid_request"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, b"invalid_request"),
        (b"CONNECT a:80 HTTP/1.1\r\nhost: a\r\n\r\n", 400, b"invalid_request"),
        (b"GET ftp://a/x HTTP/1.1\r\nhost: a\r\n\r\n", 400, b"invalid_request"),
        (b"GET http://me@a/x HTTP/1.1\r\nhost: a\r\n\r\n", 400, b"invalid_request"),
        (b"GET http:///x HTTP/1.1\r\nhost: a\r\n\r\n", 400, b"invalid_request"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, b"invalid_request"),
        (b"GET /" + b"x" * 33_000 + b" HTTP/1.1\r\nhost: a\r\n\r\n", 431, b"headers_too_large"),
        (HEAD + b"x: " + b"y" * 33_000, 431, b"headers_too_large"),
        (HEAD + b"".join(b"x-%d: 1\r\n" % n for n in range(HEADER_LIMIT)) + b"\r\n", 431, b"headers_too_large"),
        (HEAD + b"content-length: 300001\r\n\r\n", 413, b"request_too_large"),
        (HEAD + b"transfer-encoding: chunked\r\n\r\n" + b"10000\r\n" + b"x" * 65536, None, b""),
    ],
)
async def test_what_can_be_read_in_two_ways_is_refused(request_bytes: bytes, status: int | None, code: bytes) -> None:
    """A request that two parties could take for two different ones gets 400 and the end of its connection."""
    async with served(HASTY) as here, connected(here.url) as peer:
        answer = await said(peer, request_bytes)
        if status is None:
            assert answer.startswith(b"HTTP/1.1 408 ")  # half of one is waited for, but not for ever
            return
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 %d " % status)
        assert b"\r\nx-code: " + code in head
        assert b"connection: close" in head
        assert body.startswith(b'{"error"')


@pytest.mark.parametrize("piece", [1, 7, 1000])
async def test_however_it_is_cut(piece: int) -> None:
    """Where a request is cut on its way makes no difference, and requests come one after the other."""
    whole = HEAD + b"content-length: 5\r\n\r\nhello"
    chunked = (
        HEAD.replace(b"/x", b"/y?a=b")
        + b"transfer-encoding: chunked\r\n\r\n2;x=y\r\nhe\r\n3\r\nllo\r\n0\r\nt: 1\r\n\r\n"
    )
    async with served() as here, connected(here.url) as peer:
        for request, told in ((whole, b"POST /x 5"), (chunked, b"POST /y?a=b 5"), (whole, b"POST /x 5")):
            for place in range(0, len(request), piece):
                await peer.say(request[place : place + piece])
                await asyncio.sleep(0)
            assert (await peer.read_until(told)).startswith(b"HTTP/1.1 200 OK\r\ndate: ")


async def test_requests_in_a_row_are_answered_in_order() -> None:
    """Who sends several at once gets the answers in their order, and each is asked when it is its turn."""
    async with served() as here, connected(here.url) as peer:
        get = b"GET %b HTTP/1.1\r\nhost: a\r\n\r\n"
        await peer.say(get % b"/wait" + get % b"/stream" + get % b"/x")
        await eventually(lambda: here.handler.started or None)
        assert here.handler.started == [b"/wait"]
        here.handler.go.set()
        await peer.read_until(b"GET /wait 0")
        assert (await peer.read_until(b"0\r\n\r\n")).endswith(b"3\r\none\r\n3\r\ntwo\r\n5\r\nthree\r\n0\r\n\r\n")
        await peer.read_until(b"GET /x 0")


async def test_too_many_in_a_row() -> None:
    """Nobody fills the memory with requests that wait behind one."""
    async with served() as here, connected(here.url) as peer:
        await peer.say(b"GET /wait HTTP/1.1\r\nhost: a\r\n\r\n" * 40)
        await eventually(lambda: here.handler.started or None)
        here.handler.go.set()
        answers = await peer.read_all()
        assert answers.count(b"HTTP/1.1 200 OK") == 17
        assert answers.count(b"HTTP/1.1 400 ") == 1


async def test_http_1_0() -> None:
    """An old client gets no chunks: the end of the connection is the end of a stream."""
    async with served() as here:
        async with connected(here.url) as peer:
            answer = await said(peer, b"GET /stream HTTP/1.0\r\n\r\n")
            assert answer.endswith(b"\r\n\r\nonetwothree")
            assert b"chunked" not in answer
        async with connected(here.url) as peer:
            await peer.say(b"GET /x HTTP/1.0\r\nconnection: keep-alive\r\n\r\n")
            await peer.read_until(b"GET /x 0")
            assert (await said(peer, b"GET /y HTTP/1.0\r\n\r\n")).endswith(b"GET /y 0")


async def test_head_has_no_body() -> None:
    """HEAD gets the head of what GET would get."""
    async with served() as here, connected(here.url) as peer:
        await peer.say(b"HEAD /x HTTP/1.1\r\nhost: a\r\n\r\nGET /y HTTP/1.1\r\nhost: a\r\n\r\n")
        answer = await peer.read_until(b"GET /y 0")
        assert b"content-length: 9\r\n\r\nHTTP/1.1 200 OK" in answer


async def test_a_client_that_asks_before_it_sends() -> None:
    """`Expect: 100-continue` is answered, or refused before the body is sent."""
    async with served() as here:
        async with connected(here.url) as peer:
            await peer.say(HEAD + b"content-length: 2\r\nexpect: 100-continue\r\n\r\n")
            await peer.read_until(b"100 Continue\r\n\r\n")
            await peer.say(b"ab")
            await peer.read_until(b"POST /x 2")
        async with connected(here.url) as peer:
            await peer.say(HEAD + b"content-length: 300001\r\nexpect: 100-continue\r\n\r\n")
            assert (await peer.read_until(b"\r\n\r\n")).startswith(b"HTTP/1.1 413 ")


async def test_whoever_is_refused_hears_why() -> None:
    """A client that writes its whole body before it reads gets the refusal, and none of the body is kept."""
    async with served() as here:
        async with httpx.AsyncClient(timeout=DEADLINE_SECONDS, trust_env=False) as client:
            for size in (0, 10, 100_000, 200_000, 5 * 2**20):
                answer = await client.post(f"{here.url}/secret", content=b"x" * size)
                assert (answer.status_code, here.front.reserved_bytes) == (401, 0)
                assert ("connection" in answer.headers) == (size > 256 * 1024)
        assert here.handler.started == [b"/secret"] * 5


async def test_bodies_share_a_bound() -> None:
    """All bodies together take no more memory than they may; whoever is too much is told to come back."""
    async with served() as here, connected(here.url) as first, connected(here.url) as second:
        await first.say(HEAD + b"content-length: 250001\r\n\r\n" + b"x" * 250_000)
        await eventually(lambda: here.front.reserved_bytes == 250_000 or None)
        await second.say(HEAD + b"content-length: 250000\r\n\r\n" + b"x" * 250_000)
        assert (await second.read_until(b"\r\n\r\n")).startswith(b"HTTP/1.1 429 ")
        await first.say(b"x")
        await first.read_until(b"POST /x 250001")
        await eventually(lambda: here.front.reserved_bytes == 0 or None)


@pytest.mark.parametrize(
    "begun, answer",
    [
        (b"", b""),  # who says nothing is told nothing
        (b"GET /x HT", b"HTTP/1.1 408 "),
        (HEAD + b"content-length: 5\r\n\r\nhell", b"HTTP/1.1 408 "),
        (b"GET /x HTTP/1.1\r\nhost: a\r\n\r\n", b"HTTP/1.1 200 "),
    ],
)
async def test_a_client_that_falls_silent(begun: bytes, answer: bytes) -> None:
    """Whoever takes too long, before, within or after a request, loses the connection."""
    async with served(HASTY) as here, connected(here.url) as peer:
        assert (await said(peer, begun)).startswith(answer)


async def test_a_client_that_dribbles() -> None:
    """A head has its time as a whole: a byte now and then doesn't keep it open."""
    async with served(HASTY) as here, connected(here.url) as peer:
        with suppress(ConnectionError):
            async with asyncio.timeout(DEADLINE_SECONDS):
                await peer.say(b"GET /")
                while not here.handler.started:
                    await peer.say(b"x")
                    await asyncio.sleep(0.01)
        assert (await peer.read_all()).startswith(b"HTTP/1.1 408 ")


async def test_a_client_that_does_not_read_is_cut_off() -> None:
    """What it hasn't read is bounded, and after a while its request ends."""
    async with served(HASTY) as here, connected(here.url) as peer:
        await peer.say(b"GET /flood HTTP/1.1\r\nhost: a\r\n\r\n")
        await eventually(lambda: here.handler.started or None)
        await eventually(lambda: here.front.busy == 0 or None)
        with suppress(ConnectionError):
            await peer.read_all()


async def test_a_client_that_leaves_ends_its_request() -> None:
    """Orderly or not, before the first byte or in a stream."""
    async with served() as here:
        for path in (b"/wait", b"/flood"):
            for leave in (Peer.finish, Peer.reset):
                before = len(here.handler.left)
                async with connected(here.url) as peer:
                    await peer.say(b"GET %b HTTP/1.1\r\nhost: a\r\n\r\n" % path)
                    await eventually(lambda: here.front.busy or None)
                    leave(peer)
                    await eventually(lambda: here.front.busy == 0 or None)
                await eventually(lambda: len(here.handler.left) == before + 1 or None)  # noqa: B023


async def test_what_runs_is_ended_when_the_time_is_up() -> None:
    """A front that stops ends what doesn't end by itself, and closes every connection."""
    async with served() as here, connected(here.url) as peer, connected(here.url) as idle:
        await peer.say(b"GET /wait HTTP/1.1\r\nhost: a\r\n\r\n")
        await eventually(lambda: here.front.busy or None)
        await here.front.drain(0.05)
        assert here.handler.left == [b"/wait"]
        assert await peer.read_all() == b""
        assert await idle.read_all() == b""
