"""Clients that leave, that do not read, and that wait."""

import asyncio
import json
from typing import Any

import pytest

from serving.replica import Replica, State
from tests.fakes.running import DEADLINE_SECONDS, FakeReplica, eventually, running_fake
from tests.gateway.fleet import (
    CHAT,
    CONFIG,
    HELLO,
    JSON,
    STREAM,
    Fleet,
    deployment,
    error_of,
    running_gateway,
)
from tests.gateway.proxy.exchanging import (
    DONE,
    LAST,
    event,
    routing_headers,
    unused_url,
    urls,
)
from tests.gateway.wire import Peer, chunk, connected, scripted, stream_head

pytestmark = pytest.mark.asyncio(loop_scope="session")

# Clients that leave


@pytest.mark.parametrize("streaming", [False, True])
async def test_a_client_that_leaves_before_the_first_byte(fleet: Fleet, streaming: bool) -> None:
    """The replica sees it at once, unary or streamed, and nothing stays in flight."""
    before = await fleet.total("quantgate_requests_total", code="499", variant="hi")
    async with running_fake("--fake-stall-before-first-byte") as fake:
        with fleet.replicas(("hi", fake.url)):
            task = asyncio.create_task(fleet.ask(STREAM if streaming else HELLO))
            await fake.requested(CHAT)
            task.cancel()
            assert await fake.ended() == [{"event": "aborted", "tokens": 0}]
            await fleet.at_rest()
    assert await fleet.total("quantgate_requests_total", code="499", variant="hi") == before + 1


async def test_a_client_that_leaves_in_the_middle(fleet: Fleet) -> None:
    """The replica stops generating."""
    async with running_fake("--fake-stall-after-tokens", "2") as fake:
        with fleet.replicas(("hi", fake.url)):
            async with fleet.client.stream("POST", CHAT, json=STREAM) as answer:
                async for line in answer.aiter_lines():
                    if "heard" in line:
                        break
            assert await fake.ended() == [{"event": "aborted", "tokens": 2}]
            await fleet.at_rest()


async def test_a_client_that_leaves_after_the_end(fleet: Fleet) -> None:
    """SDKs close as soon as they have read [DONE]: that is a complete answer, and not a 499."""

    async def behaviour(peer: Peer) -> None:
        await peer.request()
        await peer.say(stream_head() + chunk(LAST + DONE))
        await peer.left()  # the end of the body is never sent

    before = await fleet.total("quantgate_requests_total", code="200", variant="hi")
    async with scripted(behaviour) as replica:
        with fleet.replicas(("hi", replica.url)):
            async with fleet.client.stream("POST", CHAT, json=STREAM) as answer:
                async for line in answer.aiter_lines():
                    if "[DONE]" in line:
                        break
            await fleet.at_rest()
    assert await fleet.total("quantgate_requests_total", code="200", variant="hi") == before + 1


async def test_a_client_that_leaves_while_it_waits(fleet: Fleet) -> None:
    """It leaves only a count."""
    before = await fleet.total("quantgate_requests_total", code="499", alias="smol", variant="none")
    with fleet.replicas(("hi", unused_url()), state=State.STARTING):
        task = asyncio.create_task(fleet.ask())
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not await fleet.total("quantgate_requests_in_flight"):
                pass
        task.cancel()
        await fleet.at_rest()
    assert await fleet.total("quantgate_requests_total", code="499", alias="smol", variant="none") == before + 1


async def test_a_client_that_does_not_read(fleet: Fleet) -> None:
    """A slow client slows its replica down, and does not fill memory; when it leaves, its stream ends."""
    sent, gone = 0, asyncio.Event()
    piece = event('{"model":"m1","choices":["' + "x" * 2**16 + '"]}')

    async def behaviour(peer: Peer) -> None:
        nonlocal sent
        await peer.request()
        await peer.say(stream_head())
        try:
            while sent < 500 * 2**20:
                await peer.say(chunk(piece))
                sent += len(piece)
        finally:
            gone.set()

    async with urls(behaviour) as (url,):
        with fleet.replicas(("hi", url)):
            async with connected(fleet.url) as peer:
                await peer.say(post(STREAM))
                await peer.read_until(b"\r\n\r\n")
                async with asyncio.timeout(DEADLINE_SECONDS):
                    before = -1
                    while before != sent:
                        before = sent
                        await asyncio.sleep(0.1)
                assert sent < 100 * 2**20
            async with asyncio.timeout(DEADLINE_SECONDS):
                await gone.wait()
            await fleet.at_rest()


def post(body: dict[str, Any], path: str = CHAT) -> bytes:
    """Encode a request."""
    content = json.dumps(body).encode()
    return f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: {JSON['content-type']}\r\n".encode() + (
        b"content-length: %d\r\n\r\n" % len(content) + content
    )


# Waiting


async def test_a_request_waits_for_a_replica_that_starts(fleet: Fleet, fake: FakeReplica) -> None:
    """It is answered as soon as the replica is ready."""
    for state in (State.STARTING, State.WARMING):
        with fleet.replicas(("hi", fake.url), state=state):
            task = asyncio.create_task(fleet.ask())
            async with asyncio.timeout(DEADLINE_SECONDS):
                while not await fleet.total("quantgate_requests_in_flight"):
                    pass
            fleet.registry.move("hi-0", State.READY)
            answer = await task
        assert (answer.status_code, routing_headers(answer)[-2:]) == (200, ("1", "preferred"))


async def test_waiting_has_an_end() -> None:
    """After `queue_seconds` the client gets 503: how many are starting, and a retry-after; the wait is counted."""
    settings = {**CONFIG["gateway"], "limits": {"queue_seconds": 0.05}}
    async with running_gateway(deployment({"gateway": settings})) as fleet:
        with fleet.replicas(("hi", unused_url()), state=State.STARTING):
            answer = await fleet.ask()
        assert await fleet.total("quantgate_queue_seconds_count", alias="smol") == 1
        assert await fleet.total("quantgate_requests_total", alias="smol", variant="none", code="503") == 1
    error = error_of(answer)
    assert (answer.status_code, error["code"]) == (503, "no_ready_replica")
    assert error["message"] == "no replica of 'smol' became ready in time: 1 starting, of 1; try again later"
    assert int(answer.headers["retry-after"]) > 0
    assert routing_headers(answer) == (None,) * 5


@pytest.mark.parametrize("state", [State.FAILED, State.DRAINING, State.STOPPED, State.STOPPING])
async def test_no_replica_may_become_ready(fleet: Fleet, state: State) -> None:
    """The request is refused at once."""
    with fleet.replicas(("hi", unused_url()), ("lo", unused_url()), state=state):
        answer = await fleet.ask()
    word = {State.FAILED: "failed", State.STOPPED: "stopped"}.get(state, "stopping")
    message = f"no replica of 'smol' is ready: 2 {word}, of 2"
    assert (answer.status_code, error_of(answer)["message"]) == (503, message)
    assert "retry-after" in answer.headers


async def test_a_failed_request_does_not_wait(fleet: Fleet) -> None:
    """When all ready replicas have failed it, the request does not wait for one that starts."""
    with fleet.replicas(("hi", unused_url())):
        fleet.registry.put(Replica("lo-9", "lo", "int4", unused_url(), "m1"), State.STARTING)
        try:
            answer = await fleet.ask()
        finally:
            fleet.registry.remove("lo-9")
    assert (answer.status_code, error_of(answer)["code"]) == (502, "upstream_unreachable")


async def test_a_request_with_a_floor_waits(fleet: Fleet, fake: FakeReplica) -> None:
    """A ready replica that is not permitted does not end the wait for one that is."""
    with fleet.replicas(("lo", fake.url)):
        fleet.registry.put(Replica("hi-9", "hi", "bf16", fake.url, "m1"), State.STARTING)
        task = asyncio.create_task(fleet.ask(headers={"x-quantgate-precision": "bf16"}))
        try:
            async with asyncio.timeout(DEADLINE_SECONDS):
                while not await fleet.total("quantgate_requests_in_flight"):
                    pass
            fleet.registry.move("hi-9", State.READY)
            answer = await task
        finally:
            fleet.registry.remove("hi-9")
    assert routing_headers(answer) == ("hi", "bf16", "hi-9", "1", "preferred")


async def test_the_replica_aborts_the_requests_of_clients_that_left(fleet: Fleet) -> None:
    """Each of them ends there, and nothing stays in flight."""
    async with running_fake("--fake-stall-after-tokens", "1") as fake:
        with fleet.replicas(("hi", fake.url)):
            tasks = [asyncio.create_task(fleet.ask(STREAM)) for _ in range(5)]
            await fake.requested(CHAT, 5)
            for task in tasks:
                task.cancel()
            assert len(await eventually(lambda: ends if len(ends := fake.endings()) == 5 else None)) == 5
            await fleet.at_rest()
