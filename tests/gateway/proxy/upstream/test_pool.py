"""Pooled connections: used again while they are fresh, and never when they may be out of step."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import uvicorn

from gateway.errors import UpstreamDisconnected, UpstreamTimeout, UpstreamUnreachable
from gateway.proxy.upstream.pool import Pool
from gateway.proxy.upstream.timer import DEFAULT_TIMEOUTS
from gateway.routing.target import Timeouts
from tests.fakes.running import DEADLINE_SECONDS, HOST, POLL_SECONDS
from tests.gateway.wire import Peer, answering, scripted, stream, whole

pytestmark = pytest.mark.asyncio(loop_scope="session")

REQUEST = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}"


async def ask(pool: Pool, url: str, timeouts: Timeouts = DEFAULT_TIMEOUTS) -> bytes:
    """Send one request, and read its reply to the end."""
    with await pool.open(url, REQUEST, timeouts) as connection:
        assert connection.status == 200
        return await connection.read(2**20)


async def test_a_connection_is_used_again() -> None:
    """Requests one after the other share a connection; concurrent requests have one each."""
    async with scripted(answering(whole(b"1"), stream(b"2"), whole(b"3"), close=False)) as replica, Pool() as pool:
        assert [await ask(pool, replica.url) for _ in range(3)] == [b"1", b"2", b"3"]
        assert len(replica.peers) == 1
        assert repr(pool) == f"<Pool [{replica.url}: 1 idle]>"
    async with scripted(answering(whole(b"1"), close=False)) as replica, Pool() as pool:
        assert await asyncio.gather(*(ask(pool, replica.url) for _ in range(3))) == [b"1"] * 3
        assert len(replica.peers) == 3
        assert repr(pool) == f"<Pool [{replica.url}: 3 idle]>"


async def test_the_end_of_a_pool_closes_idle_connections() -> None:
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


@pytest.mark.parametrize("sent", [whole(b"1", extra="connection: close\r\n"), whole(b"1") + b"2", whole(b"1")[:-1]])
async def test_a_connection_that_may_be_out_of_step_is_closed(sent: bytes) -> None:
    """Only a single, complete reply leaves a connection that may be used again."""

    async def behaviour(peer: Peer) -> None:
        await peer.request()
        await peer.say(sent)
        await peer.left()

    async with scripted(behaviour) as replica, Pool() as pool:
        for number in (1, 2):
            with suppress(UpstreamTimeout):
                assert await ask(pool, replica.url, Timeouts(0.2, 0.2)) == b"1"
            assert len(replica.peers) == number


async def test_a_reply_that_is_not_read_closes_its_connection() -> None:
    """The next request gets none of its bytes."""
    async with scripted(answering(whole(b"12"), close=False)) as replica, Pool() as pool:
        with await pool.open(replica.url, REQUEST):
            pass
        assert await ask(pool, replica.url) == b"12"
        assert len(replica.peers) == 2


async def test_idle_connections_expire() -> None:
    """A connection is used while it is fresh; those that were idle for too long are closed."""
    now = 0.0
    answers = answering(*[whole(b"1")] * 9, close=False)
    async with scripted(answers) as replica, Pool(idle_seconds=4, clock=lambda: now) as pool:
        await asyncio.gather(*(ask(pool, replica.url) for _ in range(3)))
        now = 3.9
        await ask(pool, replica.url)
        assert len(replica.peers) == 3
        now = 4.1
        await ask(pool, replica.url)
        assert len(replica.peers) == 3, "the one that was used at 3.9 s is used again"
        assert repr(pool) == f"<Pool [{replica.url}: 1 idle]>"
        now = 8.2
        await ask(pool, replica.url)
        assert len(replica.peers) == 4


async def test_a_connection_that_closes_as_a_request_is_sent() -> None:
    """The request is sent again, on a new connection."""
    requests: list[bytes] = []

    async def behaviour(peer: Peer) -> None:
        number = len(replica.peers)
        requests.append(await peer.request())
        await peer.say(whole(b"%d" % number))
        if number == 1:
            # What the client sees when the close of the connection and a request cross.
            requests.append(await peer.request())
            peer.reset()
        await peer.left()

    async with scripted(behaviour) as replica, Pool() as pool:
        assert await ask(pool, replica.url) == b"1"
        assert await ask(pool, replica.url) == b"2"
        assert requests == [REQUEST] * 3


async def test_a_request_is_sent_again_only_once() -> None:
    """A request that makes a replica close does not go through every idle connection."""
    closed = 0

    async def behaviour(peer: Peer) -> None:
        nonlocal closed
        first = len(replica.peers) <= 3
        await peer.request()
        if first:
            await together.wait()
            await peer.say(whole(b"1"))
            await peer.request()
        closed += 1

    together = asyncio.Barrier(3)
    async with scripted(behaviour) as replica, Pool() as pool:
        await asyncio.gather(*(ask(pool, replica.url) for _ in range(3)))
        with pytest.raises(UpstreamDisconnected):
            await ask(pool, replica.url)
        assert closed == 2


async def test_a_request_whose_reply_has_begun_is_not_sent_again() -> None:
    """After the first byte of a reply the replica has worked on it; a retry is not the pool's to decide."""

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


async def test_a_closed_idle_connection_is_not_used() -> None:
    """A connection whose close was noticed is replaced."""
    async with scripted(answering(whole(b"1"))) as replica, Pool() as pool:
        await ask(pool, replica.url)
        idle = pool._idle[replica.url, None][0][1]
        async with asyncio.timeout(DEADLINE_SECONDS):
            while idle.reusable:  # noqa: ASYNC110 - waits for the other side
                await asyncio.sleep(POLL_SECONDS)
        assert await ask(pool, replica.url) == b"1"
        assert len(replica.peers) == 2


async def test_unreachable() -> None:
    """A refused connection, an unknown name, and a connection that takes too long raise UpstreamUnreachable."""
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
    async with Pool() as pool:
        for url in (f"http://{HOST}:{port}", "http://no-such-host.invalid:1"):
            with pytest.raises(UpstreamUnreachable) as caught:
                await ask(pool, url)
            assert caught.value.message == "no connection to a replica", "clients get no addresses"
    async with scripted(answering(whole(b"1"))) as replica, Pool() as pool:
        with pytest.raises(UpstreamUnreachable) as caught:
            await ask(pool, replica.url, Timeouts(connect_seconds=0))
        assert isinstance(caught.value.__cause__, TimeoutError)


async def test_a_replica_without_tls() -> None:
    """An https url of a replica that speaks plain HTTP is unreachable."""
    async with scripted(answering()) as replica, Pool() as pool:
        with pytest.raises(UpstreamUnreachable):
            await ask(pool, replica.url.replace("http:", "https:"))


async def test_cancelling_closes_the_connection() -> None:
    """A request that is cancelled before the reply closes its connection, and the replica stops."""
    requested = asyncio.Event()

    async def behaviour(peer: Peer) -> None:
        await peer.request()
        requested.set()
        await peer.left()
        left.set()

    left = asyncio.Event()
    async with scripted(behaviour) as replica, Pool() as pool:
        asking = asyncio.create_task(ask(pool, replica.url))
        await requested.wait()
        asking.cancel()
        async with asyncio.timeout(DEADLINE_SECONDS):
            await left.wait()
        with pytest.raises(asyncio.CancelledError):
            await asking


async def test_a_server_that_closes_as_the_next_request_is_sent() -> None:
    """No request fails that is sent shortly before or after the server closes an idle connection."""
    async with short_keep_alive(KEEP_ALIVE_SECONDS) as (url, bodies), Pool(idle_seconds=DEADLINE_SECONDS) as pool:
        chains = 20

        async def chain(number: int) -> None:
            for turn in range(10):
                assert await ask(pool, url) == b"ok"
                # From well before the server closes to well after it.
                await asyncio.sleep(KEEP_ALIVE_SECONDS * (0.5 + (number + turn) % chains / chains))

        await asyncio.gather(*map(chain, range(chains)))
        assert len(bodies) == 10 * chains


KEEP_ALIVE_SECONDS = 0.1


@asynccontextmanager
async def short_keep_alive(keep_alive_seconds: float) -> AsyncIterator[tuple[str, list[bytes]]]:
    """Run uvicorn, as vLLM uses it, on its own thread; yields its url and the bodies that it got."""
    bodies: list[bytes] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        bodies.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    with socket.create_server((HOST, 0)) as listening:
        # vLLM takes whole seconds; uvicorn takes fractions, too.
        options: dict[str, Any] = {"timeout_keep_alive": keep_alive_seconds}
        server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_config=None, **options))
        running = asyncio.create_task(asyncio.to_thread(server.run, [listening]))
        try:
            yield f"http://{HOST}:{listening.getsockname()[1]}", bodies
        finally:
            server.should_exit = True
            await running


async def test_a_connection_with_a_partly_written_request_is_not_used_again() -> None:
    """The replica replied early and may never read the rest: the next request gets a new connection."""

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
        with await pool.open(replica.url, REQUEST + b"x" * 2**25) as connection:
            assert await connection.read(9) == b"1"
        assert await ask(pool, replica.url) == b"2"
        assert len(replica.peers) == 2
        together.set()
