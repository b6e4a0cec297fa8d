"""One connection to a replica, over real sockets: every way in which a reply can end, and those in which it can't."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest

from gateway.errors import UpstreamDisconnected, UpstreamTimeout
from gateway.proxy.upstream.connection import HEADER_LIMIT_BYTES, HIGH_WATER_BYTES, Connection
from gateway.proxy.upstream.timer import Timeouts
from tests.fakes.running import DEADLINE_SECONDS, POLL_SECONDS
from tests.gateway.wire import Behaviour, Flood, Peer, answering, chunk, scripted, stream, stream_head, whole

pytestmark = pytest.mark.asyncio(loop_scope="session")

REQUEST = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}"
LIMIT = 2**20
PATIENT = Timeouts(DEADLINE_SECONDS, DEADLINE_SECONDS, 2 * DEADLINE_SECONDS)
HASTY = Timeouts(0.05, 0.05, DEADLINE_SECONDS)


@asynccontextmanager
async def connection_to(behaviour: Behaviour) -> AsyncIterator[Connection]:
    """A connection to a replica that behaves like this."""
    async with scripted(behaviour) as replica:
        host, _, port = replica.url.removeprefix("http://").rpartition(":")
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(Connection, host, int(port))
        try:
            yield connection
        finally:
            connection.close()


async def reply(connection: Connection, deadlines: Timeouts = PATIENT) -> tuple[int, bytes]:
    """Ask, and read the whole reply."""
    connection.send(REQUEST, deadlines)
    head = await connection.head()
    return head.status, await connection.read(LIMIT)


LONG = b"x" * 300_000
CLOSING = b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n"


@pytest.mark.parametrize(
    "said, status, body, reusable",
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
async def test_replies_with_an_end(said: bytes, status: int, body: bytes, reusable: bool) -> None:
    """A reply that says where it ends is read up to there; what stands behind it belongs to nobody's answer."""
    async with connection_to(answering(said, close=False)) as connection:
        assert await reply(connection) == (status, body)
        assert connection.reusable is reusable


@pytest.mark.parametrize("said", [CLOSING + b"a" * 9, CLOSING.replace(b"1.1", b"1.0") + b"a" * 9])
async def test_a_reply_that_ends_with_its_connection(said: bytes) -> None:
    """Without a length the end of the connection is the end; such a connection is used once."""
    async with connection_to(answering(said)) as connection:
        assert await reply(connection) == (200, b"a" * 9)
        assert not connection.reusable


@pytest.mark.parametrize(
    "said, words",
    [
        (b"", "closed the connection too early"),
        (b"HTTP/1.1 200", "closed the connection too early"),
        (b"HTTP/1.1 200 OK\r\ncontent-le", "closed the connection too early"),
        (b"HTTP/1.1 100 Continue\r\n\r\n", "closed the connection too early"),
        (whole(b"hello")[:-1], "closed the connection too early"),
        (stream(b"a")[:-5], "closed the connection too early"),
        (stream_head() + b"5\r\nabc", "closed the connection too early"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "is no HTTP"),
        (b"\x16\x03\x01\x02\x00", "is no HTTP"),
        (b"<html>502 Bad Gateway</html>", "is no HTTP"),
        (stream_head() + b"zz\r\nabc", "is no HTTP"),
        (whole(b"a").replace(b"content-length: 1", b"content-length: -1"), "is no HTTP"),
        (whole(b"ab", extra="content-length: 1\r\n"), "is no HTTP"),
        (whole(b"ab", extra="transfer-encoding: chunked\r\n"), "is no HTTP"),
        (b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\nPRI *", "is no HTTP"),
        (whole(b"ab").replace(b"content-length: 2", b"content-length: 2, 2"), "is no HTTP"),
        (whole(b"ab").replace(b"content-length: 2", b"content-length: +2"), "is no HTTP"),
        (whole(b"ab").replace(b"content-length: 2", b"content-length: 0x2"), "is no HTTP"),
        (whole(b"ab").replace(b"content-length: 2", b"content-length: 99999999999999999999"), "is no HTTP"),
        (stream_head() + b"fffffffffffffffff\r\nabc", "is no HTTP"),
        (stream_head() + b"-1\r\nabc", "is no HTTP"),
        (stream_head() + b"1\r\nabc\r\n", "is no HTTP"),
        (whole(b"a", extra="x\0: 1\r\n"), "is no HTTP"),
        (whole(b"a", extra="x y: 1\r\n"), "is no HTTP"),
        (whole(b"a", extra="no colon\r\n"), "is no HTTP"),
        (whole(b"a").replace(b"HTTP/1.1", b"HTTP/3.1"), "is no HTTP"),
        (whole(b"a", extra=f"x-long: {'y' * HEADER_LIMIT_BYTES}\r\n"), "is no HTTP"),
        (whole(b"a", extra="".join(f"x-{i}: {'y' * 100}\r\n" for i in range(700))), "is no HTTP"),
    ],
)
async def test_replies_without_an_end(said: bytes, words: str) -> None:
    """Whatever else a replica says is told as an answer that was not whole, and the connection is not used again."""
    async with connection_to(answering(said)) as connection:
        with pytest.raises(UpstreamDisconnected, match=words):
            await reply(connection)
        assert not connection.reusable


@pytest.mark.parametrize(
    "begin, more",
    [
        (b"HTTP/1.1 200 ", b"O"),
        (b"HTTP/1.1 200 OK\r\nx-long: ", b"y"),
        (b"HTTP/1.1 200 OK\r\n", b"y"),
        (b"", b"HTTP/1.1 103 Early Hints\r\n\r\n"),
        (stream_head() + chunk(b"a") + b"1;name=", b"y"),
        (stream_head() + chunk(b"a") + b"0\r\nx-trailer: ", b"y"),
    ],
)
async def test_lines_without_an_end(begin: bytes, more: bytes) -> None:
    """A replica can't fill the memory with one line, nor with many, and is hung up on."""
    left = asyncio.Event()

    async def behaviour(peer: Peer) -> None:
        await peer.request()
        try:
            await peer.say(begin)
            while True:
                await peer.say(more * (10_000 // len(more)))
        except ConnectionError:
            left.set()

    async with connection_to(behaviour) as connection:
        with pytest.raises(UpstreamDisconnected, match="have no end"):
            await reply(connection)
        assert connection.received_bytes < 2**20
        async with asyncio.timeout(DEADLINE_SECONDS):
            await left.wait()


async def test_trailers_without_number() -> None:
    """Each is short, and all of them together too long."""
    said = stream_head() + chunk(b"a") + b"0\r\n" + b"".join(b"x-%d: %b\r\n" % (i, b"y" * 100) for i in range(700))
    async with connection_to(answering(said)) as connection:
        with pytest.raises(UpstreamDisconnected, match="is no HTTP"):
            await reply(connection)


async def test_an_answer_before_the_request_was_read() -> None:
    """It counts, but a connection on which a part of a request is still to be written takes no other one."""
    answered = asyncio.Event()

    async def behaviour(peer: Peer) -> None:
        await peer.say(whole(b"too long", "413 Too Large"))
        await answered.wait()

    async with connection_to(behaviour) as connection:
        connection.send(REQUEST + b"x" * 2**25, PATIENT)
        assert (await connection.head()).status == 413
        assert await connection.read(LIMIT) == b"too long"
        assert not connection.reusable
        answered.set()


async def test_time_is_up_while_the_connection_is_held_back() -> None:
    """What arrived before is there to be read; then it is a timeout."""

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
            while connection._failure is None:  # noqa: ASYNC110 - what is waited for is a clock
                await asyncio.sleep(POLL_SECONDS)
        assert len(await connection.more()) > HIGH_WATER_BYTES
        with pytest.raises(UpstreamTimeout):
            await connection.more()


async def test_a_reset_is_no_end() -> None:
    """A reset in a reply without a length is a failure: the end of such a reply is an orderly one."""

    async def behaviour(peer: Peer) -> None:
        await peer.request()
        await peer.say(CLOSING + b"half")
        peer.reset()

    async with connection_to(behaviour) as connection:
        connection.send(REQUEST, PATIENT)
        with pytest.raises(UpstreamDisconnected):
            await connection.head()
            await connection.read(LIMIT)


async def test_chunks_come_as_they_arrive() -> None:
    """Each piece is there before the next one is sent."""
    asked, go = asyncio.Event(), asyncio.Event()

    async def behaviour(peer: Peer) -> None:
        await peer.request()
        await peer.say(stream_head())
        for piece in (b"1", b"2", b"3"):
            await peer.say(chunk(piece))
            await go.wait()
            go.clear()
        await peer.say(chunk(b""))
        asked.set()
        await peer.left()

    async with connection_to(behaviour) as connection:
        connection.send(REQUEST, PATIENT)
        assert (await connection.head()).streams
        seen = []
        while piece := await connection.more():
            seen.append(piece)
            go.set()
        assert seen == [b"1", b"2", b"3"]
        assert connection.reusable


async def test_a_body_in_pieces_of_one_byte() -> None:
    """Where a reply is cut on its way makes no difference."""
    said = b"HTTP/1.1 100 Continue\r\n\r\n" + stream(b"ab", "é汉".encode(), b"c")

    async def behaviour(peer: Peer) -> None:
        await peer.request()
        for place in range(len(said)):
            await peer.say(said[place : place + 1])
            await asyncio.sleep(0)
        await peer.left()

    async with connection_to(behaviour) as connection:
        assert await reply(connection) == (200, "abé汉c".encode())
        assert connection.reusable


async def test_one_request_after_the_other() -> None:
    """A connection that was left in step serves again, and starts from nothing."""
    replies = (whole(b"one", extra="x-first: 1\r\n"), stream(b"two"), whole(b"three", "500 No"))
    async with connection_to(answering(*replies, close=False)) as connection:
        assert await reply(connection) == (200, b"one")
        assert await reply(connection) == (200, b"two")
        assert b"x-first" not in (await connection.head()).headers
        assert await reply(connection) == (500, b"three")


async def test_a_connection_that_is_not_read_to_its_end_is_not_reusable() -> None:
    """As long as bytes of a reply are left, or still to come, no other request may be sent."""
    async with connection_to(answering(whole(b"one"), close=False)) as connection:
        connection.send(REQUEST, PATIENT)
        await connection.head()
        assert connection.reusable is False
        while await connection.more():
            assert connection.reusable is True


async def test_bytes_that_nobody_asked_for() -> None:
    """A connection that speaks while it lies idle is out of step."""
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
    """Wait until a connection has noticed that it can't be used any more."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while connection.reusable:  # noqa: ASYNC110 - what is waited for is the other side
            await asyncio.sleep(POLL_SECONDS)


async def test_silence_before_the_head() -> None:
    """A replica that never answers is given up, and sees its client leave."""
    left: list[bool] = []

    async def behaviour(peer: Peer) -> None:
        await peer.request()
        left.append(await peer.left())

    async with connection_to(behaviour) as connection:
        with pytest.raises(UpstreamTimeout, match=r"said nothing for 0\.05 s"):
            await reply(connection, HASTY)
        assert not connection.reusable
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not left:  # noqa: ASYNC110 - what is waited for is the other side
                await asyncio.sleep(POLL_SECONDS)


@pytest.mark.parametrize("head", [stream_head(), CLOSING])
async def test_silence_in_the_middle(head: bytes) -> None:
    """What came before the silence is passed on; then it is an error and not an end, whatever form the reply has."""

    async def behaviour(peer: Peer) -> None:
        await peer.request()
        await peer.say(head + (chunk(b"one") if head != CLOSING else b"one"))
        await peer.left()

    async with connection_to(behaviour) as connection:
        connection.send(REQUEST, HASTY)
        await connection.head()
        seen = []
        with pytest.raises(UpstreamTimeout):
            while piece := await connection.more():
                seen.append(piece)
        assert seen == [b"one"]


async def test_speaking_again_and_again_is_not_silence() -> None:
    """Silence is counted from the last byte, not from the request."""
    silence_seconds, loop = 0.3, asyncio.get_running_loop()

    async def behaviour(peer: Peer) -> None:
        await peer.request()
        await peer.say(stream_head())
        end = loop.time() + 2 * silence_seconds
        while loop.time() < end:
            await peer.say(chunk(b"x"))
            await asyncio.sleep(POLL_SECONDS)
        await peer.say(chunk(b""))
        await peer.left()

    async with connection_to(behaviour) as connection:
        status, body = await reply(connection, Timeouts(silence_seconds, silence_seconds))
        assert (status, body.strip(b"x")) == (200, b"")


async def test_a_slow_reader_holds_the_replica_back() -> None:
    """What the client has not taken yet is bounded, and all of it arrives in the end."""
    flood = Flood(40 * 2**20)

    silence_seconds, loop = 0.3, asyncio.get_running_loop()
    async with connection_to(flood) as connection:
        connection.send(REQUEST, Timeouts(silence_seconds, silence_seconds))
        await connection.head()
        # Nobody reads: the connection fills up, and the watchdog does not take that for the replica's silence.
        async with asyncio.timeout(DEADLINE_SECONDS):
            before, rings = -1, loop.time() + 2 * silence_seconds
            while before != flood.said or loop.time() < rings:
                before = flood.said
                await asyncio.sleep(0.1)
        assert flood.said < flood.total / 2, "the rest of it waits in the replica"
        pieces = []
        while data := await connection.more():
            pieces.append(data)
        assert len(pieces[0]) < 4 * HIGH_WATER_BYTES
        assert sum(map(len, pieces)) == flood.total
        assert connection.reusable


async def test_an_answer_that_never_ends() -> None:
    """However much is said, and however quickly, an answer has its time as a whole, and no more."""

    async def behaviour(peer: Peer) -> None:
        await peer.request()
        await peer.say(stream_head())
        with suppress(ConnectionError):
            while True:
                await peer.say(chunk(b"x"))
                await asyncio.sleep(POLL_SECONDS)

    async with connection_to(behaviour) as connection:
        with pytest.raises(UpstreamTimeout, match=r"not whole after 0\.3 s"):
            await reply(connection, Timeouts(DEADLINE_SECONDS, DEADLINE_SECONDS, 0.3))


async def test_a_shorter_deadline_on_a_connection_that_was_used_before() -> None:
    """The deadlines are those of the request, not of the one before it."""

    async def behaviour(peer: Peer) -> None:
        await peer.request()
        await peer.say(whole(b"one"))
        await peer.request()
        await peer.left()

    async with connection_to(behaviour) as connection:
        assert await reply(connection) == (200, b"one")
        with pytest.raises(UpstreamTimeout, match=r"said nothing for 0\.05 s"):
            await reply(connection, HASTY)


async def test_an_answer_longer_than_the_limit() -> None:
    """Reading a whole body stops where it gets too long."""
    async with connection_to(answering(whole(b"x" * 101), close=False)) as connection:
        connection.send(REQUEST, PATIENT)
        await connection.head()
        with pytest.raises(UpstreamDisconnected, match="longer than 100 bytes"):
            await connection.read(100)


async def test_closing_is_leaving() -> None:
    """To the replica, a closed connection is a client that left."""
    gone = asyncio.Event()

    async def behaviour(peer: Peer) -> None:
        await peer.request()
        await peer.say(stream_head() + chunk(b"one"))
        if await peer.left():
            gone.set()

    async with connection_to(behaviour) as connection:
        connection.send(REQUEST, PATIENT)
        await connection.head()
        connection.close()
        async with asyncio.timeout(DEADLINE_SECONDS):
            await gone.wait()


async def test_it_runs_on_asyncio_too() -> None:
    """Nothing here needs uvloop."""

    async def exchange() -> tuple[int, bytes]:
        async with connection_to(answering(stream(b"a", b"b"), close=False)) as connection:
            return await reply(connection)

    assert await asyncio.to_thread(asyncio.run, exchange()) == (200, b"ab")
