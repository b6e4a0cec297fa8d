"""The body of a reply given to a feed: the same bytes as when it is read, and backpressure while the feed is full."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import UpstreamDisconnected, UpstreamTimeout
from gateway.proxy.upstream.connection import HIGH_WATER_BYTES, Connection
from gateway.proxy.upstream.pool import Pool
from tests.fakes.running import DEADLINE_SECONDS
from tests.gateway.proxy.upstream.connecting import (
    CLOSING,
    HASTY,
    LONG,
    PATIENT,
    REQUEST,
    connection_to,
    next_piece,
)
from tests.gateway.wire import Flood, Peer, Still, answering, chunk, scripted, stream, stream_head, whole

pytestmark = pytest.mark.asyncio(loop_scope="session")


@dataclass(slots=True)
class Pieces:
    """A feed that keeps what it is given; `full` says whether it is full after a number of pieces."""

    full: Callable[[int], bool] = lambda _: False
    pieces: list[bytes] = field(default_factory=list)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)

    def feed(self, data: bytes) -> bool:
        """Keep a piece."""
        self.pieces.append(data)
        self.arrived.set()
        return not self.full(len(self.pieces))

    @property
    def body(self) -> bytes:
        """All pieces."""
        return b"".join(self.pieces)


async def flow_to_end(connection: Connection, pieces: Pieces) -> int:
    """Let the body flow to its end; returns how often the feed was full."""
    times = 0
    while not await connection.flow(pieces.feed):
        times += 1
    return times


@pytest.mark.parametrize("often", [1, 2, 3])
@pytest.mark.parametrize(
    "sent, body, reusable",
    [
        (whole(b"hello"), b"hello", True),
        (whole(b""), b"", True),
        (whole(LONG), LONG, True),
        (stream(b"a", b"bc", b"\r\n0\r\n"), b"abc\r\n0\r\n", True),
        (stream(*[b"x" * 100_000] * 9), b"x" * 900_000, True),
        (b"HTTP/1.1 204 No Content\r\n\r\n", b"", True),
        (CLOSING + b"a" * 9, b"a" * 9, False),
        (whole(b"a") + b"b", b"a", False),
    ],
)
async def test_the_same_bytes(sent: bytes, body: bytes, often: int, *, reusable: bool) -> None:
    """However often the feed is full, it gets every byte once, in order, and then the end."""
    kept = Pieces(lambda count: count % often == 0)
    async with connection_to(answering(sent, close=sent.startswith(CLOSING))) as connection:
        connection.send(REQUEST, PATIENT)
        await connection.head()
        times = await flow_to_end(connection, kept)
        assert kept.body == body
        assert times == len(kept.pieces) // often
        assert connection.reusable is reusable
        assert await connection.flow(kept.feed), "the end stays the end"


@given(st.lists(st.binary(min_size=1, max_size=9), max_size=6), st.data())
async def test_wherever_it_is_split(pieces: list[bytes], data: st.DataObject) -> None:
    """However a reply arrives, and whenever the feed is full, it gets the same bytes."""
    sent = stream(*pieces)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(sent) - 1), max_size=9)))
    full = data.draw(st.lists(st.booleans(), min_size=99, max_size=99))
    connection, kept = Connection(), Pieces(lambda count: full[count % len(full)])
    connection.connection_made(Still())
    connection.send(REQUEST, PATIENT)
    flowing = asyncio.create_task(flow_to_end(connection, kept))
    for start, end in zip([0, *cuts], [*cuts, len(sent)], strict=True):
        connection.data_received(sent[start:end])
        if data.draw(st.booleans()):
            await asyncio.sleep(0)
    async with asyncio.timeout(DEADLINE_SECONDS):
        await flowing
    connection.close()
    assert kept.body == b"".join(pieces)


async def test_each_piece_in_the_step_in_which_it_arrives() -> None:
    """The feed gets a piece before the task that waits for the end runs again."""
    kept = Pieces()
    connection = Connection()
    connection.connection_made(Still())
    connection.send(REQUEST, PATIENT)
    flowing = asyncio.create_task(connection.flow(kept.feed))
    await asyncio.sleep(0)
    for piece in (b"1", b"2"):
        connection.data_received((b"" if kept.pieces else stream_head()) + chunk(piece))
        assert kept.pieces[-1] == piece
    connection.data_received(chunk(b""))
    assert await flowing
    connection.close()


async def test_backpressure_of_a_full_feed() -> None:
    """What a full feed has not taken is bounded, and the rest waits in the replica."""
    flood = Flood(40 * 2**20)
    kept = Pieces(lambda count: count == 1)
    async with connection_to(flood) as connection:
        connection.send(REQUEST, PATIENT)
        assert not await connection.flow(kept.feed)
        async with asyncio.timeout(DEADLINE_SECONDS):
            before = -1
            while before != flood.sent:
                before = flood.sent
                await asyncio.sleep(0.1)
        assert flood.sent < flood.total / 2
        assert len(kept.pieces) == 1, "a full feed is given nothing"
        assert await connection.flow(kept.feed)
        assert len(kept.pieces[1]) < 4 * HIGH_WATER_BYTES
        assert len(kept.body) == flood.total
        assert connection.reusable


class FeedError(Exception):
    """An error of a feed."""


@pytest.mark.parametrize("at_once", [True, False])
async def test_an_error_of_a_feed(at_once: bool) -> None:
    """`flow` raises it, whether the piece was there before or arrived while it waited; the loop goes on."""
    go = asyncio.Event()

    async def behaviour(peer: Peer) -> None:
        await peer.request()
        await peer.say(stream_head() + (chunk(b"1") if at_once else b""))
        await go.wait()
        await peer.say(b"" if at_once else chunk(b"1"))
        await peer.left()

    def feed(_: bytes) -> bool:
        raise FeedError

    async with connection_to(behaviour) as connection:
        connection.send(REQUEST, PATIENT)
        await connection.head()
        asyncio.get_running_loop().call_soon(go.set)
        with pytest.raises(FeedError):
            await connection.flow(feed)
        assert not connection.reusable


async def test_an_error_of_a_feed_ends_with_its_request() -> None:
    """If it was raised for the last piece, the connection serves the next request, which does not raise it."""
    ready = [asyncio.Event(), asyncio.Event()]

    async def behaviour(peer: Peer) -> None:
        for go, piece in zip(ready, (b"1", b"2"), strict=True):
            await peer.request()
            await peer.say(stream_head())
            await go.wait()
            await peer.say(chunk(piece) + chunk(b""))
        await peer.left()

    def feed(_: bytes) -> bool:
        raise FeedError

    async def ask(pool: Pool, url: str, go: asyncio.Event, feed: Callable[[bytes], bool]) -> bool:
        with await pool.open(url, REQUEST, PATIENT) as connection:
            asyncio.get_running_loop().call_soon(go.set)
            return await connection.flow(feed)

    kept = Pieces()
    async with scripted(behaviour) as replica, Pool() as pool:
        with pytest.raises(FeedError):
            await ask(pool, replica.url, ready[0], feed)
        assert await ask(pool, replica.url, ready[1], kept.feed)
        assert kept.body == b"2"
        assert len(replica.peers) == 1


async def test_cancelled() -> None:
    """A cancelled flow feeds nothing more; what arrives afterwards can be read."""
    go = asyncio.Event()

    async def behaviour(peer: Peer) -> None:
        await peer.request()
        await peer.say(stream_head() + chunk(b"1"))
        await go.wait()
        await peer.say(chunk(b"2") + chunk(b""))
        await peer.left()

    kept = Pieces()
    async with connection_to(behaviour) as connection:
        connection.send(REQUEST, PATIENT)
        flowing = asyncio.create_task(connection.flow(kept.feed))
        await kept.arrived.wait()
        flowing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await flowing
        go.set()
        assert await next_piece(connection) == b"2"
        assert kept.pieces == [b"1"]


@pytest.mark.parametrize("sent", [stream_head() + chunk(b"one"), whole(b"one!")[:-1], stream_head() + b"4\r\none"])
async def test_a_reply_that_ends_in_the_middle(sent: bytes) -> None:
    """The feed gets what arrived; then `flow` raises, each time that it is called."""
    kept = Pieces()
    async with connection_to(answering(sent)) as connection:
        connection.send(REQUEST, PATIENT)
        for _ in range(2):
            with pytest.raises(UpstreamDisconnected):
                await flow_to_end(connection, kept)
        assert kept.body == b"one"
        assert not connection.reusable


async def test_invalid_bytes_in_the_middle() -> None:
    """The feed gets what stands before them."""
    kept = Pieces()
    async with connection_to(answering(stream_head() + chunk(b"one") + b"zz\r\n", close=False)) as connection:
        connection.send(REQUEST, PATIENT)
        with pytest.raises(UpstreamDisconnected, match="is not valid HTTP"):
            await flow_to_end(connection, kept)
        assert kept.body == b"one"


async def test_silence_in_the_middle() -> None:
    """The feed gets what arrived, and the wait ends."""
    kept = Pieces()
    async with connection_to(answering(stream_head() + chunk(b"one"), close=False)) as connection:
        connection.send(REQUEST, HASTY)
        with pytest.raises(UpstreamTimeout):
            await flow_to_end(connection, kept)
        assert kept.body == b"one"
