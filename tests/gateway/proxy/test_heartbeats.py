"""Streams that wait are kept open with comments: what the client sees of them, and what becomes of the answer."""

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
BEATS = 14
READ_SECONDS = 1.2  # less than so many beats take
TIMEOUTS = {"heartbeat_seconds": EVERY_SECONDS, "queue_seconds": DEADLINE_SECONDS}
COMMENT = b": keep-alive\n\n"
EVENTS = events(recorded("text"))
PERFECT = expected(recorded("text"), usage=False)
TEXT = 'Der Bär schläft。汉字 👩‍👩‍👧 "model":"m1"\\n\n\n'
MESSAGES: Any = HELLO["messages"]


@asynccontextmanager
async def patient(**timeouts: float) -> AsyncIterator[Fleet]:
    """A gateway whose alias has these timeouts."""
    alias = {"ladder": ["hi", "mid"], "timeouts": {**TIMEOUTS, **timeouts}}
    async with running_gateway(deployment({"aliases": {"smol": alias}})) as fleet:
        yield fleet
        await fleet.at_rest()


def later(go: asyncio.Event, data: bytes) -> Behaviour:
    """Say this to each request, when it is time."""

    async def behaviour(peer: Peer) -> None:
        while True:
            await peer.request()
            await go.wait()
            await peer.say(data)

    return behaviour


async def beaten(fleet: Fleet, times: int = BEATS) -> None:
    """Wait for so many comments."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while await fleet.total("quantgate_heartbeats_total") < times:  # noqa: ASYNC110 - another task's progress
            await asyncio.sleep(POLL_SECONDS)


async def read(fleet: Fleet) -> bytes:
    """Ask for a stream, and read it."""
    answer = await fleet.ask(STREAM)
    assert answer.status_code == 200
    assert "x-quantgate-variant" not in answer.headers
    return answer.content


def after_comments(body: bytes) -> tuple[bytes, bytes]:
    """Split off the comments: what says who answers, and all that follows."""
    assert body.count(COMMENT) >= BEATS
    left = body
    while left.startswith(COMMENT):
        left = left.removeprefix(COMMENT)
    told, _, answer = left.partition(b"\n\n")
    return told, answer


@pytest.mark.parametrize("begun", [False, True], ids=["before the head", "behind the head"])
async def test_comments_then_the_answer(begun: bool) -> None:
    """Whatever the replica waits with; who answers is told in a comment, and nothing comes between the events."""
    go = asyncio.Event()
    answer = stream(*EVENTS)
    first = answer.partition(b"\r\n\r\n")[0] + b"\r\n\r\n" if begun else b""

    async def behaviour(peer: Peer) -> None:
        await peer.request()
        await peer.say(first)
        await go.wait()
        await peer.say(answer.removeprefix(first))

    async with patient() as fleet, scripted(behaviour) as replica:
        with fleet.replicas(("mid", replica.url)):
            reading = asyncio.create_task(read(fleet))
            await beaten(fleet)
            go.set()
            told, body = after_comments(await reading)
        assert told == b": quantgate variant=mid precision=int8 replica=mid-0 reason=fallback attempts=1"
        assert body == PERFECT
        beats = await fleet.total("quantgate_heartbeats_total")
        # The connection is kept: a beat that went on would be seen in the next answer.
        assert (await fleet.ask({**HELLO, "model": "nobody"})).status_code == 404
        assert await fleet.total("quantgate_heartbeats_total") == beats


async def test_the_sdk_waits_longer_than_it_would() -> None:
    """Its read timeout is shorter than the silence, and it reads a perfect answer."""
    go = asyncio.Event()
    async with patient() as fleet, scripted(later(go, stream(*EVENTS))) as replica, sdk(fleet) as client:
        with fleet.replicas(("hi", replica.url)):
            asking = asyncio.create_task(said(client))
            await beaten(fleet)
            go.set()
            assert await asking == TEXT


async def test_a_failure_behind_comments_is_an_error_in_the_stream() -> None:
    """The status has gone out; the SDK raises all the same."""
    go = asyncio.Event()
    failed = whole(b'{"error":{"message":"secret","code":500}}', "500 Internal Server Error")
    async with patient() as fleet, scripted(later(go, failed)) as replica, sdk(fleet) as client:
        with fleet.replicas(("hi", replica.url)):
            asking = asyncio.create_task(said(client))
            await beaten(fleet)
            go.set()
            with pytest.raises(openai.APIError, match="a replica failed with status 500") as caught:
                await asking
        assert caught.value.code == "upstream_error"
        assert await fleet.total("quantgate_requests_total", code="502") == 1


async def test_another_replica_behind_comments() -> None:
    """Nothing of an answer has gone out: another replica is asked, and the comment says who it was."""
    go = asyncio.Event()
    async with (
        patient() as fleet,
        scripted(later(go, whole(b"{}", "500 Internal Server Error"))) as bad,
        scripted(later(go, stream(*EVENTS))) as good,
    ):
        with fleet.replicas(("hi", bad.url), ("mid", good.url)):
            reading = asyncio.create_task(read(fleet))
            await beaten(fleet)
            go.set()
            told, body = after_comments(await reading)
    assert told == b": quantgate variant=mid precision=int8 replica=mid-1 reason=fallback attempts=2"
    assert body == PERFECT


async def test_whoever_waits_in_line_hears_comments_too() -> None:
    """The line is where the longest waits are."""
    go = asyncio.Event()
    async with patient() as fleet, scripted(later(go, stream(*EVENTS))) as replica, sdk(fleet) as client:
        fleet.registry.put(Replica("r", "hi", "bf16", replica.url, "m1", max_in_flight=1), State.READY)
        asking = [asyncio.create_task(said(client)) for _ in range(3)]
        await beaten(fleet, 3 * BEATS)
        assert await fleet.total("quantgate_waiting", alias="smol") == 2
        go.set()
        assert await asyncio.gather(*asking) == [TEXT] * 3


async def test_the_end_of_a_wait_behind_comments() -> None:
    """Nobody got ready in time: an error in the stream."""
    async with patient(queue_seconds=EVERY_SECONDS * 3) as fleet, sdk(fleet) as client:
        with fleet.replicas(("hi", "http://127.0.0.1:1"), state=State.STARTING):
            with pytest.raises(openai.APIError, match="got ready in time") as caught:
                await said(client)
            assert caught.value.code == "no_ready_replica"
        assert await fleet.total("quantgate_requests_total", code="503") == 1


async def test_no_comments_where_they_would_be_in_the_way() -> None:
    """A whole answer has one status and one body; and 0 is never."""
    go = asyncio.Event()
    async with (
        patient() as fleet,
        patient(heartbeat_seconds=0) as silent,
        scripted(later(go, whole(WHOLE))) as unary,
        scripted(later(go, stream(*EVENTS))) as streaming,
    ):
        with fleet.replicas(("hi", unary.url), ("hi", streaming.url)), silent.replicas(("hi", streaming.url)):
            asking = asyncio.create_task(fleet.ask(HELLO))
            quiet = asyncio.create_task(silent.ask(STREAM))
            # Meanwhile a stream beats, beside them.
            beating = asyncio.create_task(fleet.ask(STREAM))
            await beaten(fleet)
            go.set()
            assert (await asking).content == WHOLE.replace(b'"m1"', b'"smol"', 1)
            assert (await quiet).content == PERFECT
            assert (await beating).status_code == 200
            assert await silent.total("quantgate_heartbeats_total") == 0


async def test_a_client_that_leaves_behind_comments() -> None:
    """The beat ends with it."""
    go = asyncio.Event()
    async with patient() as fleet, scripted(later(go, stream(*EVENTS))) as replica:
        with fleet.replicas(("hi", replica.url)):
            async with fleet.client.stream("POST", CHAT, json=STREAM) as answer:
                await anext(answer.aiter_raw())
            await fleet.at_rest()
            assert await fleet.total("quantgate_requests_total", code="499") == 1


@asynccontextmanager
async def sdk(fleet: Fleet) -> AsyncIterator[AsyncOpenAI]:
    """A client with little patience."""
    timeout = httpx.Timeout(DEADLINE_SECONDS, read=READ_SECONDS)
    async with AsyncOpenAI(base_url=f"{fleet.url}/v1", api_key="any", timeout=timeout, max_retries=0) as client:
        yield client


async def said(client: AsyncOpenAI) -> str:
    """Have a model say something, as an application does."""
    answer = await client.chat.completions.create(model="smol", messages=MESSAGES, stream=True)
    return "".join([each.choices[0].delta.content or "" async for each in answer if each.choices])


async def test_one_beat_under_two_configurations() -> None:
    """A stream that goes on waiting under a new configuration doesn't beat twice, nor behind its end."""
    go = asyncio.Event()
    other = {"ladder": ["mid"], "timeouts": TIMEOUTS}
    async with patient() as fleet, scripted(later(go, stream(*EVENTS))) as replica, connected(fleet.url) as peer:
        with fleet.replicas(("hi", replica.url), state=State.STARTING):
            await peer.say(posted(STREAM))
            await beaten(fleet, 1)
            fleet.served.live_config.replace(live_config_for(deployment({"aliases": {"smol": other}})))
        with fleet.replicas(("mid", replica.url)):
            go.set()
            again = asyncio.create_task(peer.read_until(b"\r\n0\r\n\r\n"))
            assert EVENTS[-1] in await again
            go.clear()
            # While another stream beats, nothing comes behind the end of this one.
            beating = asyncio.create_task(fleet.ask(STREAM))
            await beaten(fleet, int(await fleet.total("quantgate_heartbeats_total")) + BEATS)
            go.set()
            await peer.say(posted({**HELLO, "model": "nobody"}))
            assert (await peer.read_some()).startswith(b"HTTP/1.1 404 ")
            assert (await beating).status_code == 200
