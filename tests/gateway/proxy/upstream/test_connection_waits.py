"""Silence, slow readers and ends of upstream connections."""

import asyncio
from contextlib import suppress

import pytest

from gateway.errors import UpstreamDisconnected, UpstreamTimeout
from gateway.proxy.upstream.connection import HIGH_WATER_BYTES
from gateway.routing.target import Timeouts
from tests.fakes.running import DEADLINE_SECONDS, POLL_SECONDS
from tests.gateway.proxy.upstream.connecting import CLOSING, HASTY, PATIENT, REQUEST, connection_to, next_piece, reply
from tests.gateway.wire import Flood, Peer, answering, chunk, stream, stream_head, whole

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_silence_before_the_head() -> None:
    """A replica that never replies ends in a timeout, and sees its client leave."""
    left: list[bool] = []

    async def behaviour(peer: Peer) -> None:
        await peer.request()
        left.append(await peer.left())

    async with connection_to(behaviour) as connection:
        with pytest.raises(UpstreamTimeout, match=r"sent nothing for 0\.05 s"):
            await reply(connection, HASTY)
        assert not connection.reusable
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not left:  # noqa: ASYNC110 - waits for the other side
                await asyncio.sleep(POLL_SECONDS)


@pytest.mark.parametrize("head", [stream_head(), CLOSING])
async def test_silence_in_the_middle(head: bytes) -> None:
    """What arrived before the silence can be read; then it raises, also in a reply without a length."""

    async def behaviour(peer: Peer) -> None:
        await peer.request()
        await peer.say(head + (chunk(b"one") if head != CLOSING else b"one"))
        await peer.left()

    async with connection_to(behaviour) as connection:
        connection.send(REQUEST, HASTY)
        await connection.head()
        pieces = []
        with pytest.raises(UpstreamTimeout):
            while piece := await next_piece(connection):
                pieces.append(piece)
        assert pieces == [b"one"]


async def test_silence_counts_from_the_last_byte() -> None:
    """It does not count from the request."""
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


async def test_backpressure_of_a_slow_reader() -> None:
    """What has not been read is bounded, and all of it arrives in the end."""
    flood = Flood(40 * 2**20)
    silence_seconds, loop = 0.3, asyncio.get_running_loop()
    async with connection_to(flood) as connection:
        connection.send(REQUEST, Timeouts(silence_seconds, silence_seconds))
        await connection.head()
        # While nothing is read, the connection fills up, and the timer does not take that for the replica's silence.
        async with asyncio.timeout(DEADLINE_SECONDS):
            before, until = -1, loop.time() + 2 * silence_seconds
            while before != flood.sent or loop.time() < until:
                before = flood.sent
                await asyncio.sleep(0.1)
        assert flood.sent < flood.total / 2, "the rest of it waits in the replica"
        pieces = []
        while data := await next_piece(connection):
            pieces.append(data)
        assert len(pieces[0]) < 4 * HIGH_WATER_BYTES
        assert sum(map(len, pieces)) == flood.total
        assert connection.reusable


async def test_a_reply_that_never_ends() -> None:
    """The whole of a reply has a timeout, however often bytes arrive."""

    async def behaviour(peer: Peer) -> None:
        await peer.request()
        await peer.say(stream_head())
        with suppress(ConnectionError):
            while True:
                await peer.say(chunk(b"x"))
                await asyncio.sleep(POLL_SECONDS)

    async with connection_to(behaviour) as connection:
        with pytest.raises(UpstreamTimeout, match=r"not complete after 0\.3 s"):
            await reply(connection, Timeouts(DEADLINE_SECONDS, DEADLINE_SECONDS, 0.3))


async def test_a_shorter_timeout_on_a_connection_that_was_used_before() -> None:
    """The timeouts are those of the request, and not of the one before."""

    async def behaviour(peer: Peer) -> None:
        await peer.request()
        await peer.say(whole(b"one"))
        await peer.request()
        await peer.left()

    async with connection_to(behaviour) as connection:
        assert await reply(connection) == (200, b"one")
        with pytest.raises(UpstreamTimeout, match=r"sent nothing for 0\.05 s"):
            await reply(connection, HASTY)


async def test_a_reply_longer_than_the_limit() -> None:
    """Reading a whole body stops at the limit."""
    async with connection_to(answering(whole(b"x" * 101), close=False)) as connection:
        connection.send(REQUEST, PATIENT)
        await connection.head()
        with pytest.raises(UpstreamDisconnected, match="longer than 100 bytes"):
            await connection.read(100)


async def test_the_replica_sees_a_close() -> None:
    """A closed connection is a client that left."""
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


async def test_the_loop_of_asyncio() -> None:
    """A connection does not need uvloop."""

    async def exchange() -> tuple[int, bytes]:
        async with connection_to(answering(stream(b"a", b"b"), close=False)) as connection:
            return await reply(connection)

    assert await asyncio.to_thread(asyncio.run, exchange()) == (200, b"ab")
