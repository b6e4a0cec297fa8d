"""Connections that are kept: used again while they are fresh, never when they may be out of step."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import uvicorn

from gateway.errors import UpstreamDisconnected, UpstreamTimeout, UpstreamUnreachable
from gateway.proxy.upstream.pool import CONNECT_SECONDS, NO_TIMEOUTS, Pool
from gateway.proxy.upstream.timer import Timeouts
from tests.fakes.running import DEADLINE_SECONDS, HOST, POLL_SECONDS
from tests.gateway.wire import Peer, answering, scripted, stream, whole

pytestmark = pytest.mark.asyncio(loop_scope="session")

REQUEST = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}"


async def ask(
    pool: Pool, url: str, deadlines: Timeouts = NO_TIMEOUTS, connect_seconds: float = CONNECT_SECONDS
) -> bytes:
    """One request, its answer read to the end."""
    async with pool.exchange(url, REQUEST, deadlines, connect_seconds) as connection:
        assert (await connection.head()).status == 200
        return await connection.read(2**20)


async def test_a_connection_is_used_again() -> None:
    """Requests one after the other share a connection; requests at once have one each."""
    async with scripted(answering(whole(b"1"), stream(b"2"), whole(b"3"), close=False)) as replica, Pool() as pool:
        assert [await ask(pool, replica.url) for _ in range(3)] == [b"1", b"2", b"3"]
        assert len(replica.peers) == 1
        assert repr(pool) == f"<Pool [{replica.url}: 1 idle]>"
    async with scripted(answering(whole(b"1"), close=False)) as replica, Pool() as pool:
        assert await asyncio.gather(*(ask(pool, replica.url) for _ in range(3))) == [b"1"] * 3
        assert len(replica.peers) == 3
        assert repr(pool) == f"<Pool [{replica.url}: 3 idle]>"


async def test_leaving_the_pool_closes_what_is_idle() -> None:
    """No connection outlives its pool."""
    left = asyncio.Event()

    async def behaviour(peer: Peer) -> None:
        await peer.request()
        await peer.say(whole(b"1"))
        await peer.left()
        left.set()

    async with scripted(behaviour) as replica:
        async with Pool() as pool:
            await ask(pool, replica.url)
        assert repr(pool) == "<Pool []>"
        async with asyncio.timeout(DEADLINE_SECONDS):
            await left.wait()


@pytest.mark.parametrize("said", [whole(b"1", extra="connection: close\r\n"), whole(b"1") + b"2", whole(b"1")[:-1]])
async def test_a_connection_that_may_be_out_of_step_is_closed(said: bytes) -> None:
    """Only a reply that was whole, and alone, leaves a connection that others may use."""

    async def behaviour(peer: Peer) -> None:
        await peer.request()
        await peer.say(said)
        await peer.left()

    async with scripted(behaviour) as replica, Pool() as pool:
        for number in (1, 2):
            with suppress(UpstreamTimeout):
                assert await ask(pool, replica.url, Timeouts(0.2, 0.2)) == b"1"
            assert len(replica.peers) == number


async def test_an_answer_that_is_not_read_costs_its_connection() -> None:
    """Who stops in the middle leaves nothing behind for the next request."""
    async with scripted(answering(whole(b"12"), close=False)) as replica, Pool() as pool:
        async with pool.exchange(replica.url, REQUEST):
            pass
        assert await ask(pool, replica.url) == b"12"
        assert len(replica.peers) == 2


async def test_idle_connections_grow_old() -> None:
    """A connection is used as long as it is fresh, and those that nobody needed are closed."""
    now = 0.0
    answers = answering(*[whole(b"1")] * 9, close=False)
    async with scripted(answers) as replica, Pool(idle_seconds=4, clock=lambda: now) as pool:
        await asyncio.gather(*(ask(pool, replica.url) for _ in range(3)))
        now = 3.9
        await ask(pool, replica.url)
        assert len(replica.peers) == 3
        now = 4.1
        await ask(pool, replica.url)
        assert len(replica.peers) == 3, "the one that was used at 3.9 s"
        assert repr(pool) == f"<Pool [{replica.url}: 1 idle]>"
        now = 8.2
        await ask(pool, replica.url)
        assert len(replica.peers) == 4


async def test_a_connection_that_closed_while_idle_is_not_noticed_by_the_client() -> None:
    """The replica closes an idle connection just as the next request comes: it is asked again, on a new one."""
    asked: list[bytes] = []

    async def behaviour(peer: Peer) -> None:
        number = len(replica.peers)
        asked.append(await peer.request())
        await peer.say(whole(b"%d" % number))
        if number == 1:
            # As it looks to the client when the end of the connection and a request cross.
            asked.append(await peer.request())
            peer.reset()
        await peer.left()

    async with scripted(behaviour) as replica, Pool() as pool:
        assert await ask(pool, replica.url) == b"1"
        assert await ask(pool, replica.url) == b"2"
        assert asked == [REQUEST] * 3


async def test_a_replica_that_hangs_up_is_asked_again_only_once() -> None:
    """A request that a replica dies of does not go through every idle connection."""
    asked = 0

    async def behaviour(peer: Peer) -> None:
        nonlocal asked
        first = len(replica.peers) <= 3
        await peer.request()
        if first:
            await together.wait()
            await peer.say(whole(b"1"))
            await peer.request()
        asked += 1

    together = asyncio.Barrier(3)
    async with scripted(behaviour) as replica, Pool() as pool:
        await asyncio.gather(*(ask(pool, replica.url) for _ in range(3)))
        with pytest.raises(UpstreamDisconnected):
            await ask(pool, replica.url)
        assert asked == 2


async def test_an_answer_that_has_begun_is_not_asked_for_again() -> None:
    """Once a byte of the answer came, the replica has worked: whether to ask elsewhere is not the pool's to decide."""

    async def behaviour(peer: Peer) -> None:
        await peer.request()
        await peer.say(whole(b"1"))
        await peer.request()
        await peer.say(b"HTTP/1.1 2")

    async with scripted(behaviour) as replica, Pool() as pool:
        await ask(pool, replica.url)
        with pytest.raises(UpstreamDisconnected):
            await ask(pool, replica.url)
        assert len(replica.peers) == 1


async def test_a_dead_idle_connection_is_not_tried() -> None:
    """A connection whose end was noticed is replaced without a try."""
    async with scripted(answering(whole(b"1"))) as replica, Pool() as pool:
        await ask(pool, replica.url)
        idle = pool._idle[replica.url, None][0][1]
        async with asyncio.timeout(DEADLINE_SECONDS):
            while idle.reusable:  # noqa: ASYNC110 - what is waited for is the other side
                await asyncio.sleep(POLL_SECONDS)
        assert await ask(pool, replica.url) == b"1"
        assert len(replica.peers) == 2


async def test_nobody_listens() -> None:
    """A refused connection, a name that nobody knows and one that takes too long are unreachable replicas."""
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
    async with Pool() as pool:
        for url in (f"http://{HOST}:{port}", "http://no-such-host.invalid:1"):
            with pytest.raises(UpstreamUnreachable) as caught:
                await ask(pool, url)
            assert caught.value.message == "no connection to a replica", "addresses are nothing for clients"
    async with scripted(answering(whole(b"1"))) as replica, Pool() as pool:
        with pytest.raises(UpstreamUnreachable) as caught:
            await ask(pool, replica.url, connect_seconds=0)
        assert isinstance(caught.value.__cause__, TimeoutError)


async def test_a_replica_without_tls() -> None:
    """An https address where plain HTTP is spoken is unreachable, not a crash."""
    async with scripted(answering()) as replica, Pool() as pool:
        with pytest.raises(UpstreamUnreachable):
            await ask(pool, replica.url.replace("http:", "https:"))


async def test_giving_up_closes_the_connection() -> None:
    """A request that is cancelled while the replica thinks closes its connection, so the replica stops."""
    asked = asyncio.Event()

    async def behaviour(peer: Peer) -> None:
        await peer.request()
        asked.set()
        await peer.left()
        left.set()

    left = asyncio.Event()
    async with scripted(behaviour) as replica, Pool() as pool:
        asking = asyncio.create_task(ask(pool, replica.url))
        await asked.wait()
        asking.cancel()
        async with asyncio.timeout(DEADLINE_SECONDS):
            await left.wait()
        with pytest.raises(asyncio.CancelledError):
            await asking


async def test_a_server_that_hangs_up_as_the_next_request_comes() -> None:
    """Requests that come about when the server closes what is idle, before and behind it: none fails."""
    async with hasty_server(KEEP_ALIVE_SECONDS) as (url, asked), Pool(idle_seconds=DEADLINE_SECONDS) as pool:
        chains = 20

        async def chain(number: int) -> None:
            for turn in range(10):
                assert await ask(pool, url) == b"ok"
                # From well before the server hangs up to well behind it.
                await asyncio.sleep(KEEP_ALIVE_SECONDS * (0.5 + (number + turn) % chains / chains))

        await asyncio.gather(*map(chain, range(chains)))
        assert len(asked) == 10 * chains


KEEP_ALIVE_SECONDS = 0.1


@asynccontextmanager
async def hasty_server(keep_alive_seconds: float) -> AsyncIterator[tuple[str, list[bytes]]]:
    """uvicorn, as vLLM uses it, on a thread of its own; gives its url and what it was asked."""
    asked: list[bytes] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        asked.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    with socket.create_server((HOST, 0)) as listening:
        # vLLM has whole seconds; uvicorn itself does not mind others.
        told: dict[str, Any] = {"timeout_keep_alive": keep_alive_seconds}
        server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_config=None, **told))
        running = asyncio.create_task(asyncio.to_thread(server.run, [listening]))
        try:
            yield f"http://{HOST}:{listening.getsockname()[1]}", asked
        finally:
            server.should_exit = True
            await running


async def test_a_connection_with_a_request_half_written_is_not_used_again() -> None:
    """The replica answered early and may never read the rest: the next request gets a connection of its own."""

    async def behaviour(peer: Peer) -> None:
        if len(replica.peers) == 1:
            await peer.say(whole(b"1"))
            await together.wait()
        else:
            await peer.request()
            await peer.say(whole(b"2"))
        await peer.left()

    together = asyncio.Event()
    async with scripted(behaviour) as replica, Pool() as pool:
        async with pool.exchange(replica.url, REQUEST + b"x" * 2**25) as connection:
            assert await connection.read(9) == b"1"
        assert await ask(pool, replica.url) == b"2"
        assert len(replica.peers) == 2
        together.set()
