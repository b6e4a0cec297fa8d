"""One connection to a replica, over real sockets: every way in which a reply ends, or fails to."""

import asyncio
from contextlib import suppress

import pytest

from gateway.errors import UpstreamDisconnected, UpstreamTimeout
from gateway.proxy.upstream.connection import HIGH_WATER_BYTES, MAX_HEAD_BYTES, Connection
from gateway.routing.target import Timeouts
from tests.fakes.running import DEADLINE_SECONDS, POLL_SECONDS
from tests.gateway.proxy.upstream.connecting import (
    CLOSING,
    LIMIT,
    LONG,
    PATIENT,
    REQUEST,
    connection_to,
    next_piece,
    reply,
)
from tests.gateway.wire import Peer, answering, chunk, stream, stream_head, whole

pytestmark = pytest.mark.asyncio(loop_scope="session")


@pytest.mark.parametrize(
    "sent, status, body, reusable",
    [
        (whole(b"hello"), 200, b"hello", True),
        (whole(b""), 200, b"", True),
        (whole(LONG), 200, LONG, True),
        (whole(b"no", "503 Busy"), 503, b"no", True),
        (stream(b"a", b"bc", b"\r\n0\r\n"), 200, b"abc\r\n0\r\n", True),
        (stream_head() + chunk(b"a") + b"0\r\nx-trailer: 1\r\n\r\n", 200, b"a", True),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2;name=value\r\nab\r\n0\r\n\r\n", 200, b"ab", True),
        (b"HTTP/1.1 204 No Content\r\n\r\n", 204, b"", True),
        (b"HTTP/1.1 204 No Content\r\ncontent-length: 5\r\n\r\nhello", 204, b"", False),
        (b"HTTP/1.1 304 Not Modified\r\ncontent-length: 5\r\n\r\n", 304, b"", True),
        (b"HTTP/1.1 304 Not Modified\r\ntransfer-encoding: chunked\r\n\r\n", 304, b"", True),
        (b"\r\n" + whole(b"a"), 200, b"a", True),
        (stream_head() + b"00A\r\n0123456789\r\n000\r\n\r\n", 200, b"0123456789", True),
        (whole(b"a", extra="".join(f"x-{i}: {'y' * 100}\r\n" for i in range(500))), 200, b"a", True),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + whole(b"a"), 200, b"a", True),
        (b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n" * 3 + whole(b"a"), 200, b"a", True),
        (whole(b"a", extra="connection: close\r\n"), 200, b"a", False),
        (b"HTTP/1.0 200 OK\r\ncontent-length: 1\r\n\r\na", 200, b"a", False),
        (whole(b"a") + b"b", 200, b"a", False),
        (whole(b"a") + whole(b"b", "500 Injected"), 200, b"a", False),
        (stream(b"a") + stream(b"b"), 200, b"a", False),
    ],
)
async def test_replies_with_an_end(sent: bytes, status: int, body: bytes, reusable: bool) -> None:
    """A reply that says where it ends is read up to there; bytes behind it belong to no reply."""
    async with connection_to(answering(sent, close=False)) as connection:
        assert await reply(connection) == (status, body)
        assert connection.reusable is reusable


@pytest.mark.parametrize("sent", [CLOSING + b"a" * 9, CLOSING.replace(b"1.1", b"1.0") + b"a" * 9])
async def test_a_reply_that_ends_with_its_connection(sent: bytes) -> None:
    """Without a length the end of the connection is the end of the reply; such a connection is used once."""
    async with connection_to(answering(sent)) as connection:
        assert await reply(connection) == (200, b"a" * 9)
        assert not connection.reusable


@pytest.mark.parametrize(
    "sent, words",
    [
        (b"", "closed the connection too early"),
        (b"HTTP/1.1 200", "closed the connection too early"),
        (b"HTTP/1.1 200 OK\r\ncontent-le", "closed the connection too early"),
        (b"HTTP/1.1 100 Continue\r\n\r\n", "closed the connection too early"),
        (whole(b"hello")[:-1], "closed the connection too early"),
        (stream(b"a")[:-5], "closed the connection too early"),
        (stream_head() + b"5\r\nabc", "closed the connection too early"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "is not valid HTTP"),
        (b"\x16\x03\x01\x02\x00", "is not valid HTTP"),
        (b"<html>502 Bad Gateway</html>", "is not valid HTTP"),
        (stream_head() + b"zz\r\nabc", "is not valid HTTP"),
        (whole(b"a").replace(b"content-length: 1", b"content-length: -1"), "is not valid HTTP"),
        (whole(b"ab", extra="content-length: 1\r\n"), "is not valid HTTP"),
        (whole(b"ab", extra="transfer-encoding: chunked\r\n"), "is not valid HTTP"),
        (b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\nPRI *", "is not valid HTTP"),
        (whole(b"ab").replace(b"content-length: 2", b"content-length: 2, 2"), "is not valid HTTP"),
        (whole(b"ab").replace(b"content-length: 2", b"content-length: +2"), "is not valid HTTP"),
        (whole(b"ab").replace(b"content-length: 2", b"content-length: 0x2"), "is not valid HTTP"),
        (whole(b"ab").replace(b"content-length: 2", b"content-length: 99999999999999999999"), "is not valid HTTP"),
        (stream_head() + b"fffffffffffffffff\r\nabc", "is not valid HTTP"),
        (stream_head() + b"-1\r\nabc", "is not valid HTTP"),
        (stream_head() + b"1\r\nabc\r\n", "is not valid HTTP"),
        (whole(b"a", extra="x\0: 1\r\n"), "is not valid HTTP"),
        (whole(b"a", extra="x y: 1\r\n"), "is not valid HTTP"),
        (whole(b"a", extra="no colon\r\n"), "is not valid HTTP"),
        (whole(b"a").replace(b"HTTP/1.1", b"HTTP/3.1"), "is not valid HTTP"),
        (whole(b"a", extra=f"x-long: {'y' * MAX_HEAD_BYTES}\r\n"), "is not valid HTTP"),
        (whole(b"a", extra="".join(f"x-{i}: {'y' * 100}\r\n" for i in range(700))), "is not valid HTTP"),
    ],
)
async def test_replies_without_an_end(sent: bytes, words: str) -> None:
    """An incomplete or invalid reply raises, and its connection is not used again."""
    async with connection_to(answering(sent)) as connection:
        with pytest.raises(UpstreamDisconnected, match=words):
            await reply(connection)
        assert not connection.reusable


@pytest.mark.parametrize(
    "start, more",
    [
        (b"HTTP/1.1 200 ", b"O"),
        (b"HTTP/1.1 200 OK\r\nx-long: ", b"y"),
        (b"HTTP/1.1 200 OK\r\n", b"y"),
        (b"", b"HTTP/1.1 103 Early Hints\r\n\r\n"),
        (stream_head() + chunk(b"a") + b"1;name=", b"y"),
        (stream_head() + chunk(b"a") + b"0\r\nx-trailer: ", b"y"),
    ],
)
async def test_lines_without_an_end(start: bytes, more: bytes) -> None:
    """A replica cannot fill the memory with one line, or with many: the connection is closed."""
    left = asyncio.Event()

    async def behaviour(peer: Peer) -> None:
        await peer.request()
        try:
            await peer.say(start)
            while True:
                await peer.say(more * (10_000 // len(more)))
        except ConnectionError:
            left.set()

    async with connection_to(behaviour) as connection:
        with pytest.raises(UpstreamDisconnected, match="do not end"):
            await reply(connection)
        assert connection.received_bytes < 2**20
        async with asyncio.timeout(DEADLINE_SECONDS):
            await left.wait()


async def test_too_many_trailers() -> None:
    """Each is short; all of them together are too long."""
    sent = stream_head() + chunk(b"a") + b"0\r\n" + b"".join(b"x-%d: %b\r\n" % (i, b"y" * 100) for i in range(700))
    async with connection_to(answering(sent)) as connection:
        with pytest.raises(UpstreamDisconnected, match="is not valid HTTP"):
            await reply(connection)


async def test_a_reply_before_the_request_was_read() -> None:
    """It is valid, but a connection with a part of a request still to write is not used again."""
    answered = asyncio.Event()

    async def behaviour(peer: Peer) -> None:
        await peer.say(whole(b"too long", "413 Too Large"))
        await answered.wait()

    async with connection_to(behaviour) as connection:
        connection.send(REQUEST + b"x" * 2**25, PATIENT)
        await connection.head()
        assert connection.status == 413
        assert await connection.read(LIMIT) == b"too long"
        assert not connection.reusable
        answered.set()


async def test_a_timeout_while_reading_is_paused() -> None:
    """What arrived before it can be read; then it raises."""

    async def behaviour(peer: Peer) -> None:
        await peer.request()
        await peer.say(b"HTTP/1.1 200 OK\r\ncontent-length: 99999999\r\n\r\n")
        with suppress(ConnectionError):
            while True:
                await peer.say(b"x" * 2**16)

    async with connection_to(behaviour) as connection:
        connection.send(REQUEST, Timeouts(total_seconds=0.3))
        await connection.head()
        async with asyncio.timeout(DEADLINE_SECONDS):
            while connection._failure is None:  # noqa: ASYNC110 - waits for a clock
                await asyncio.sleep(POLL_SECONDS)
        assert len(await next_piece(connection)) > HIGH_WATER_BYTES
        with pytest.raises(UpstreamTimeout):
            await next_piece(connection)


async def test_a_reset_does_not_end_a_reply() -> None:
    """A reply without a length ends with an orderly close; a reset is a failure."""

    async def behaviour(peer: Peer) -> None:
        await peer.request()
        await peer.say(CLOSING + b"half")
        peer.reset()

    async with connection_to(behaviour) as connection:
        connection.send(REQUEST, PATIENT)
        with pytest.raises(UpstreamDisconnected):
            await connection.head()
            await connection.read(LIMIT)


async def test_chunks_are_available_as_they_arrive() -> None:
    """Each piece can be read before the next one is sent."""
    go = asyncio.Event()

    async def behaviour(peer: Peer) -> None:
        await peer.request()
        await peer.say(stream_head())
        for piece in (b"1", b"2", b"3"):
            await peer.say(chunk(piece))
            await go.wait()
            go.clear()
        await peer.say(chunk(b""))
        await peer.left()

    async with connection_to(behaviour) as connection:
        connection.send(REQUEST, PATIENT)
        await connection.head()
        assert connection.streams
        pieces = []
        while piece := await next_piece(connection):
            pieces.append(piece)
            go.set()
        assert pieces == [b"1", b"2", b"3"]
        assert connection.reusable


async def test_a_body_in_pieces_of_one_byte() -> None:
    """Where a reply is split on its way makes no difference."""
    sent = b"HTTP/1.1 100 Continue\r\n\r\n" + stream(b"ab", "é汉".encode(), b"c")

    async def behaviour(peer: Peer) -> None:
        await peer.request()
        for place in range(len(sent)):
            await peer.say(sent[place : place + 1])
            await asyncio.sleep(0)
        await peer.left()

    async with connection_to(behaviour) as connection:
        assert await reply(connection) == (200, "abé汉c".encode())
        assert connection.reusable


async def test_one_request_after_the_other() -> None:
    """A connection whose reply was read serves the next request, and keeps nothing of the last reply."""
    replies = (whole(b"one", extra="x-first: 1\r\n"), stream(b"two"), whole(b"three", "500 No"))
    async with connection_to(answering(*replies, close=False)) as connection:
        assert await reply(connection) == (200, b"one")
        assert await reply(connection) == (200, b"two")
        await connection.head()
        assert b"x-first" not in connection.headers
        assert await reply(connection) == (500, b"three")


async def test_a_connection_is_reusable_only_after_its_reply_was_read() -> None:
    """While bytes of a reply are left, or still to come, no other request may be sent."""
    async with connection_to(answering(whole(b"one"), close=False)) as connection:
        connection.send(REQUEST, PATIENT)
        await connection.head()
        assert connection.reusable is False
        while await next_piece(connection):
            assert connection.reusable is True


async def test_bytes_on_an_idle_connection() -> None:
    """A connection that receives bytes without a request is out of step."""
    go = asyncio.Event()

    async def behaviour(peer: Peer) -> None:
        await peer.request()
        await peer.say(whole(b"one"))
        await go.wait()
        await peer.say(whole(b"two"))
        await peer.left()

    async with connection_to(behaviour) as connection:
        assert await reply(connection) == (200, b"one")
        assert connection.reusable
        go.set()
        await until_unusable(connection)


async def test_a_connection_that_closes_while_idle() -> None:
    """The end of an idle connection is noticed."""
    async with connection_to(answering(whole(b"one"))) as connection:
        await reply(connection)
        await until_unusable(connection)


async def until_unusable(connection: Connection) -> None:
    """Wait until a connection has noticed that it cannot be used any more."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while connection.reusable:  # noqa: ASYNC110 - waits for the other side
            await asyncio.sleep(POLL_SECONDS)
