"""Streams that wait are kept open with comments: what the client sees of them, and of the answer."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI

from gateway.app import live_config_for
from serving.replica import Replica, State
from tests.fakes.running import DEADLINE_SECONDS, POLL_SECONDS
from tests.gateway.fleet import CHAT, HELLO, STREAM, Fleet, deployment, running_gateway
from tests.gateway.proxy.recorded import WHOLE, events, expected, recorded
from tests.gateway.wire import Behaviour, Peer, connected, posted, scripted, stream, whole

pytestmark = pytest.mark.asyncio(loop_scope="session")

EVERY_SECONDS = 0.1
HEARTBEATS = 14
READ_SECONDS = 1.2  # less than HEARTBEATS take
TIMEOUTS = {"heartbeat_seconds": EVERY_SECONDS, "queue_seconds": DEADLINE_SECONDS}
COMMENT = b": keep-alive\n\n"
EVENTS = events(recorded("text"))
PERFECT = expected(recorded("text"), usage=False)
TEXT = 'Der Bär schläft。汉字 👩‍👩‍👧 "model":"m1"\\n\n\n'
MESSAGES: Any = HELLO["messages"]


@asynccontextmanager
async def gateway_with(**timeouts: float) -> AsyncIterator[Fleet]:
    """Run a gateway whose alias has these timeouts."""
    alias = {"ladder": ["hi", "mid"], "timeouts": {**TIMEOUTS, **timeouts}}
    async with running_gateway(deployment({"aliases": {"smol": alias}})) as fleet:
        yield fleet
        await fleet.at_rest()


def replies_after(go: asyncio.Event, data: bytes) -> Behaviour:
    """Reply to each request with these bytes, once the event is set."""

    async def behaviour(peer: Peer) -> None:
        while True:
            await peer.request()
            await go.wait()
            await peer.say(data)

    return behaviour


async def heartbeats(fleet: Fleet, times: int = HEARTBEATS) -> None:
    """Wait until this many comments were sent."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while await fleet.total("quantgate_heartbeats_total") < times:  # noqa: ASYNC110 - waits for the gateway
            await asyncio.sleep(POLL_SECONDS)


async def read(fleet: Fleet) -> bytes:
    """Request a stream, and read it."""
    answer = await fleet.ask(STREAM)
    assert answer.status_code == 200
    assert "x-quantgate-variant" not in answer.headers
    return answer.content


def after_comments(body: bytes) -> tuple[bytes, bytes]:
    """Split the heartbeats off: the comment with the routing headers, and all that follows."""
    assert body.count(COMMENT) >= HEARTBEATS
    rest = body
    while rest.startswith(COMMENT):
        rest = rest.removeprefix(COMMENT)
    routing, _, answer = rest.partition(b"\n\n")
    return routing, answer


@pytest.mark.parametrize("head_first", [False, True], ids=["before the head", "after the head"])
async def test_comments_then_the_answer(head_first: bool) -> None:
    """Comments come before and after the replica's head; one with the routing headers is the last before the events."""
    go = asyncio.Event()
    answer = stream(*EVENTS)
    first = answer.partition(b"\r\n\r\n")[0] + b"\r\n\r\n" if head_first else b""

    async def behaviour(peer: Peer) -> None:
        await peer.request()
        await peer.say(first)
        await go.wait()
        await peer.say(answer.removeprefix(first))

    async with gateway_with() as fleet, scripted(behaviour) as replica:
        with fleet.replicas(("mid", replica.url)):
            reading = asyncio.create_task(read(fleet))
            await heartbeats(fleet)
            go.set()
            routing, body = after_comments(await reading)
        assert routing == b": quantgate variant=mid precision=int8 replica=mid-0 reason=fallback attempts=1"
        assert body == PERFECT
        count = await fleet.total("quantgate_heartbeats_total")
        # The connection is kept: a heartbeat that went on would be seen in the next response.
        assert (await fleet.ask({**HELLO, "model": "unknown"})).status_code == 404
        assert await fleet.total("quantgate_heartbeats_total") == count


async def test_the_sdk_waits_longer_than_its_read_timeout() -> None:
    """Comments keep the connection alive, and the SDK reads the whole answer."""
    go = asyncio.Event()
    async with gateway_with() as fleet, scripted(replies_after(go, stream(*EVENTS))) as replica, sdk(fleet) as client:
        with fleet.replicas(("hi", replica.url)):
            asking = asyncio.create_task(chat(client))
            await heartbeats(fleet)
            go.set()
            assert await asking == TEXT


async def test_a_failure_after_comments_is_an_error_in_the_stream() -> None:
    """The status was sent already; the SDK raises all the same."""
    go = asyncio.Event()
    failed = whole(b'{"error":{"message":"secret","code":500}}', "500 Internal Server Error")
    async with gateway_with() as fleet, scripted(replies_after(go, failed)) as replica, sdk(fleet) as client:
        with fleet.replicas(("hi", replica.url)):
            asking = asyncio.create_task(chat(client))
            await heartbeats(fleet)
            go.set()
            with pytest.raises(openai.APIError, match="a replica failed with status 500") as caught:
                await asking
        assert caught.value.code == "upstream_error"
        assert await fleet.total("quantgate_requests_total", code="502") == 1


async def test_another_replica_after_comments() -> None:
    """No part of an answer was sent: another replica is tried, and the comment names it."""
    go = asyncio.Event()
    async with (
        gateway_with() as fleet,
        scripted(replies_after(go, whole(b"{}", "500 Internal Server Error"))) as bad,
        scripted(replies_after(go, stream(*EVENTS))) as good,
    ):
        with fleet.replicas(("hi", bad.url), ("mid", good.url)):
            reading = asyncio.create_task(read(fleet))
            await heartbeats(fleet)
            go.set()
            routing, body = after_comments(await reading)
    assert routing == b": quantgate variant=mid precision=int8 replica=mid-1 reason=fallback attempts=2"
    assert body == PERFECT


async def test_comments_while_a_request_is_queued() -> None:
    """The longest waits are in the queue."""
    go = asyncio.Event()
    async with gateway_with() as fleet, scripted(replies_after(go, stream(*EVENTS))) as replica, sdk(fleet) as client:
        fleet.registry.put(Replica("r", "hi", "bf16", replica.url, "m1", max_in_flight=1), State.READY)
        asking = [asyncio.create_task(chat(client)) for _ in range(3)]
        await heartbeats(fleet, 3 * HEARTBEATS)
        assert await fleet.total("quantgate_waiting", alias="smol") == 2
        go.set()
        assert await asyncio.gather(*asking) == [TEXT] * 3


async def test_a_queue_timeout_after_comments() -> None:
    """It is an error in the stream."""
    async with gateway_with(queue_seconds=EVERY_SECONDS * 3) as fleet, sdk(fleet) as client:
        with fleet.replicas(("hi", "http://127.0.0.1:1"), state=State.STARTING):
            with pytest.raises(openai.APIError, match="became ready in time") as caught:
                await chat(client)
            assert caught.value.code == "no_ready_replica"
        assert await fleet.total("quantgate_requests_total", code="503") == 1


async def test_no_comments() -> None:
    """Unary answers have none, and streams with `heartbeat_seconds` 0."""
    go = asyncio.Event()
    async with (
        gateway_with() as fleet,
        gateway_with(heartbeat_seconds=0) as silent,
        scripted(replies_after(go, whole(WHOLE))) as unary,
        scripted(replies_after(go, stream(*EVENTS))) as streaming,
    ):
        with fleet.replicas(("hi", unary.url), ("hi", streaming.url)), silent.replicas(("hi", streaming.url)):
            whole_answer = asyncio.create_task(fleet.ask(HELLO))
            quiet = asyncio.create_task(silent.ask(STREAM))
            # Another stream counts the heartbeats meanwhile.
            beating = asyncio.create_task(fleet.ask(STREAM))
            await heartbeats(fleet)
            go.set()
            assert (await whole_answer).content == WHOLE.replace(b'"m1"', b'"smol"', 1)
            assert (await quiet).content == PERFECT
            assert (await beating).status_code == 200
            assert await silent.total("quantgate_heartbeats_total") == 0


async def test_a_client_that_leaves_after_comments() -> None:
    """Its heartbeat ends."""
    go = asyncio.Event()
    async with gateway_with() as fleet, scripted(replies_after(go, stream(*EVENTS))) as replica:
        with fleet.replicas(("hi", replica.url)):
            async with fleet.client.stream("POST", CHAT, json=STREAM) as answer:
                await anext(answer.aiter_raw())
            await fleet.at_rest()
            assert await fleet.total("quantgate_requests_total", code="499") == 1


@asynccontextmanager
async def sdk(fleet: Fleet) -> AsyncIterator[AsyncOpenAI]:
    """A client with a short read timeout."""
    timeout = httpx.Timeout(DEADLINE_SECONDS, read=READ_SECONDS)
    async with AsyncOpenAI(base_url=f"{fleet.url}/v1", api_key="any", timeout=timeout, max_retries=0) as client:
        yield client


async def chat(client: AsyncOpenAI) -> str:
    """Read the text of a stream, as an application does."""
    answer = await client.chat.completions.create(model="smol", messages=MESSAGES, stream=True)
    return "".join([each.choices[0].delta.content or "" async for each in answer if each.choices])


async def test_one_heartbeat_under_two_configurations() -> None:
    """A stream that goes on waiting after a reload has one heartbeat, which ends with the stream."""
    go = asyncio.Event()
    other = {"ladder": ["mid"], "timeouts": TIMEOUTS}
    async with (
        gateway_with() as fleet,
        scripted(replies_after(go, stream(*EVENTS))) as replica,
        connected(fleet.url) as peer,
    ):
        with fleet.replicas(("hi", replica.url), state=State.STARTING):
            await peer.say(posted(STREAM))
            await heartbeats(fleet, 1)
            fleet.served.live_config.replace(live_config_for(deployment({"aliases": {"smol": other}})))
        with fleet.replicas(("mid", replica.url)):
            go.set()
            reading = asyncio.create_task(peer.read_until(b"\r\n0\r\n\r\n"))
            assert EVENTS[-1] in await reading
            go.clear()
            # While another stream has heartbeats, nothing follows the end of this one.
            beating = asyncio.create_task(fleet.ask(STREAM))
            await heartbeats(fleet, int(await fleet.total("quantgate_heartbeats_total")) + HEARTBEATS)
            go.set()
            await peer.say(posted({**HELLO, "model": "unknown"}))
            assert (await peer.read_some()).startswith(b"HTTP/1.1 404 ")
            assert (await beating).status_code == 200
