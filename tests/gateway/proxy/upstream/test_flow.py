"""A reply's body poured into a sink: the same bytes as when it is read, held back where the sink is full."""

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
from tests.gateway.proxy.upstream.test_connection import CLOSING, HASTY, LONG, PATIENT, REQUEST, connection_to
from tests.gateway.wire import Flood, Peer, Still, answering, chunk, scripted, stream, stream_head, whole

pytestmark = pytest.mark.asyncio(loop_scope="session")


@dataclass(slots=True)
class Glass:
    """A sink that keeps what is poured into it, and is full when it is told to be."""

    full: Callable[[int], bool] = lambda _: False
    pieces: list[bytes] = field(default_factory=list)
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def pour(self, data: bytes) -> bool:
        """Take a piece."""
        self.pieces.append(data)
        self.news.set()
        return not self.full(len(self.pieces))

    @property
    def body(self) -> bytes:
        """All of it."""
        return b"".join(self.pieces)


async def poured(connection: Connection, glass: Glass) -> int:
    """Pour to the end, going on whenever the glass was full; how often it was."""
    times = 0
    while not await connection.flow(glass.pour):
        times += 1
    return times


@pytest.mark.parametrize("often", [1, 2, 3])
@pytest.mark.parametrize(
    "said, body, reusable",
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
async def test_the_same_bytes(said: bytes, body: bytes, often: int, *, reusable: bool) -> None:
    """However often the sink is full: every byte once, in order, and then the end."""
    glass = Glass(lambda count: count % often == 0)
    async with connection_to(answering(said, close=said.startswith(CLOSING))) as connection:
        connection.send(REQUEST, PATIENT)
        await connection.head()
        times = await poured(connection, glass)
        assert glass.body == body
        assert times == len(glass.pieces) // often
        assert connection.reusable is reusable
        assert await connection.flow(glass.pour), "the end stays the end"


@given(st.lists(st.binary(min_size=1, max_size=9), max_size=6), st.data())
async def test_wherever_it_is_cut(pieces: list[bytes], data: st.DataObject) -> None:
    """However a reply arrives, and whenever the sink is full, the same bytes come out."""
    said = stream(*pieces)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(said) - 1), max_size=9)))
    full = data.draw(st.lists(st.booleans(), min_size=99, max_size=99))
    connection, glass = Connection(), Glass(lambda count: full[count % len(full)])
    connection.connection_made(Still())
    connection.send(REQUEST, PATIENT)
    pouring = asyncio.create_task(poured(connection, glass))
    for start, end in zip([0, *cuts], [*cuts, len(said)], strict=True):
        connection.data_received(said[start:end])
        if data.draw(st.booleans()):
            await asyncio.sleep(0)
    async with asyncio.timeout(DEADLINE_SECONDS):
        await pouring
    connection.close()
    assert glass.body == b"".join(pieces)


async def test_each_piece_in_the_step_in_which_it_arrives() -> None:
    """A piece is poured before the task that waits for the end runs again."""
    glass = Glass()
    connection = Connection()
    connection.connection_made(Still())
    connection.send(REQUEST, PATIENT)
    flowing = asyncio.create_task(connection.flow(glass.pour))
    await asyncio.sleep(0)
    for piece in (b"1", b"2"):
        connection.data_received((b"" if glass.pieces else stream_head()) + chunk(piece))
        assert glass.pieces[-1] == piece
    connection.data_received(chunk(b""))
    assert await flowing
    connection.close()


async def test_a_full_sink_holds_the_replica_back() -> None:
    """What the sink can't take is bounded, and the rest waits in the replica until it can."""
    flood = Flood(40 * 2**20)

    glass = Glass(lambda count: count == 1)
    async with connection_to(flood) as connection:
        connection.send(REQUEST, PATIENT)
        assert not await connection.flow(glass.pour)
        async with asyncio.timeout(DEADLINE_SECONDS):
            before = -1
            while before != flood.said:
                before = flood.said
                await asyncio.sleep(0.1)
        assert flood.said < flood.total / 2
        assert len(glass.pieces) == 1, "nothing is poured into a full sink"
        assert await connection.flow(glass.pour)
        assert len(glass.pieces[1]) < 4 * HIGH_WATER_BYTES
        assert len(glass.body) == flood.total
        assert connection.reusable


class Spilt(Exception):
    """What a sink of these tests raises."""


@pytest.mark.parametrize("at_once", [True, False])
async def test_what_a_sink_raises(at_once: bool) -> None:
    """It comes out of `flow`, whether the piece was there before or came while it waited; the loop goes on."""
    go = asyncio.Event()

    async def behaviour(peer: Peer) -> None:
        await peer.request()
        await peer.say(stream_head() + (chunk(b"1") if at_once else b""))
        await go.wait()
        await peer.say(b"" if at_once else chunk(b"1"))
        await peer.left()

    def sink(_: bytes) -> bool:
        raise Spilt

    async with connection_to(behaviour) as connection:
        connection.send(REQUEST, PATIENT)
        await connection.head()
        asyncio.get_running_loop().call_soon(go.set)
        with pytest.raises(Spilt):
            await connection.flow(sink)
        assert not connection.reusable


async def test_what_a_sink_raised_is_forgotten_with_its_request() -> None:
    """The refused piece may be the last one: then the connection serves again, and the next request is its own."""
    ready = [asyncio.Event(), asyncio.Event()]

    async def behaviour(peer: Peer) -> None:
        for go, piece in zip(ready, (b"1", b"2"), strict=True):
            await peer.request()
            await peer.say(stream_head())
            await go.wait()
            await peer.say(chunk(piece) + chunk(b""))
        await peer.left()

    def sink(_: bytes) -> bool:
        raise Spilt

    async def asked(pool: Pool, url: str, go: asyncio.Event, pour: Callable[[bytes], bool]) -> bool:
        async with pool.exchange(url, REQUEST, PATIENT) as connection:
            asyncio.get_running_loop().call_soon(go.set)
            return await connection.flow(pour)

    glass = Glass()
    async with scripted(behaviour) as replica, Pool() as pool:
        with pytest.raises(Spilt):
            await asked(pool, replica.url, ready[0], sink)
        assert await asked(pool, replica.url, ready[1], glass.pour)
        assert glass.body == b"2"
        assert len(replica.peers) == 1


async def test_cancelled() -> None:
    """Who gives up gets nothing more, and what comes afterwards is there for who reads on."""
    go = asyncio.Event()

    async def behaviour(peer: Peer) -> None:
        await peer.request()
        await peer.say(stream_head() + chunk(b"1"))
        await go.wait()
        await peer.say(chunk(b"2") + chunk(b""))
        await peer.left()

    glass = Glass()
    async with connection_to(behaviour) as connection:
        connection.send(REQUEST, PATIENT)
        flowing = asyncio.create_task(connection.flow(glass.pour))
        await glass.news.wait()
        flowing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await flowing
        go.set()
        assert await connection.more() == b"2"
        assert glass.pieces == [b"1"]


@pytest.mark.parametrize("said", [stream_head() + chunk(b"one"), whole(b"one!")[:-1], stream_head() + b"4\r\none"])
async def test_an_end_in_the_middle(said: bytes) -> None:
    """What came is poured; then it is an error, again and again."""
    glass = Glass()
    async with connection_to(answering(said)) as connection:
        connection.send(REQUEST, PATIENT)
        for _ in range(2):
            with pytest.raises(UpstreamDisconnected):
                await poured(connection, glass)
        assert glass.body == b"one"
        assert not connection.reusable


async def test_nonsense_in_the_middle() -> None:
    """What stands before the nonsense is poured."""
    glass = Glass()
    async with connection_to(answering(stream_head() + chunk(b"one") + b"zz\r\n", close=False)) as connection:
        connection.send(REQUEST, PATIENT)
        with pytest.raises(UpstreamDisconnected, match="is no HTTP"):
            await poured(connection, glass)
        assert glass.body == b"one"


async def test_silence_in_the_middle() -> None:
    """A sink gets no more than came, and the wait ends."""
    glass = Glass()
    async with connection_to(answering(stream_head() + chunk(b"one"), close=False)) as connection:
        connection.send(REQUEST, HASTY)
        with pytest.raises(UpstreamTimeout):
            await poured(connection, glass)
        assert glass.body == b"one"
