"""What vLLM sends is what clients get: all bytes but the model's name, mirrored reasoning and unasked usage."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from tests.fakes.running import DEADLINE_SECONDS
from tests.gateway.fleet import CHAT, HELLO, STREAM, Fleet, deployment, running_gateway
from tests.gateway.proxy.recorded import CHATS, MESSAGES, RESPONSES, WHOLE, events, expected, recorded, unmirrored
from tests.gateway.wire import (
    Behaviour,
    Peer,
    answering,
    chunk,
    connected,
    posted,
    scripted,
    stream,
    stream_head,
    whole,
)

pytestmark = pytest.mark.asyncio(loop_scope="session")

USAGE = {**STREAM, "stream_options": {"include_usage": True}}
MESSAGE: dict[str, Any] = {**STREAM, "max_tokens": 64}
RESPONSE: dict[str, Any] = {"model": "smol", "input": "hello", "stream": True}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def golden() -> AsyncIterator[Fleet]:
    """A gateway of its own, whose replicas come and go with each test."""
    async with running_gateway(deployment()) as fleet:
        yield fleet


def sending(*pieces: bytes) -> Behaviour:
    """Answer every request on a connection with a stream whose pieces are read one by one."""

    async def behaviour(peer: Peer) -> None:
        while True:
            await peer.request()
            await peer.say(stream_head())
            for piece in pieces:
                await peer.say(chunk(piece))
                await asyncio.sleep(0)  # whoever reads comes first
            await peer.say(chunk(b""))

    return behaviour


async def through(fleet: Fleet, behaviour: Behaviour, body: dict[str, Any], path: str = CHAT) -> bytes:
    """Ask, and give the bytes of the answer."""
    async with scripted(behaviour) as replica:
        with fleet.replicas(("hi", replica.url)):
            answer = await fleet.ask(body, path=path)
    assert answer.status_code == 200, answer.text
    return answer.content


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize("usage", [True, False])
async def test_chats(golden: Fleet, name: str, usage: bool) -> None:
    """Tool calls, reasoning, logprobs, several choices: all as sent, and usage for who asked for it."""
    body = recorded(name)
    got = await through(golden, sending(*events(body)), USAGE if usage else STREAM)
    assert unmirrored(got) == expected(body, usage=usage)
    assert got.count(b'"reasoning_content":') == body.count(b'"reasoning":')


@pytest.mark.parametrize("name", MESSAGES)
async def test_messages(golden: Fleet, name: str) -> None:
    """Anthropic's events: only the name in `message_start` changes."""
    body = recorded(name)
    assert await through(golden, sending(*events(body)), MESSAGE, "/v1/messages") == expected(body)


@pytest.mark.parametrize("name", RESPONSES)
async def test_responses(golden: Fleet, name: str) -> None:
    """The events of responses: the name changes in the response, and stays in what the client calls its own."""
    body = recorded(name)
    assert await through(golden, sending(*events(body)), RESPONSE, "/v1/responses") == expected(body)


async def test_a_whole_answer(golden: Fleet) -> None:
    """The first name changes, no other byte does."""
    got = await through(golden, answering(whole(WHOLE)), HELLO)
    assert got == WHOLE.replace(b'"model":"m1"', b'"model":"smol"', 1)


async def test_all_at_once(golden: Fleet) -> None:
    """A stream that comes in one piece is the same stream."""
    for name in CHATS:
        assert unmirrored(await through(golden, sending(recorded(name)), USAGE)) == expected(recorded(name))


async def test_cut_at_every_byte(golden: Fleet) -> None:
    """Wherever a read ends, in the middle of a character or of a line's end, the client gets the same bytes."""
    first, *_, last, usage, done = events(recorded("text"))
    body = b"".join([first, *events(recorded("text"))[4:7], last, usage, done])
    cuts = iter(range(1, len(body)))

    async def behaviour(peer: Peer) -> None:
        while (at := next(cuts, None)) is not None:
            await peer.request()
            await peer.say(stream_head() + chunk(body[:at]))
            for _ in range(3):
                await asyncio.sleep(0)
            await peer.say(chunk(body[at:]) + chunk(b""))
        await peer.left()

    async with scripted(behaviour) as replica:
        with golden.replicas(("hi", replica.url)):
            wrong = [at for at in range(1, len(body)) if (await golden.ask(USAGE)).content != expected(body)]
    assert wrong == []


async def test_byte_by_byte(golden: Fleet) -> None:
    """Every byte a chunk of its own."""
    for name in CHATS:
        body = recorded(name)
        pieces = [bytes([each]) for each in body]
        got = await through(golden, answering(stream(*pieces)), USAGE)
        assert unmirrored(got) == expected(body)


async def test_events_arrive_one_by_one(golden: Fleet) -> None:
    """An event goes out as soon as it is whole: the replica sends the next one only when the client has it.

    The first one has a role and nothing else: it is held back until there is content.
    """
    body = events(recorded("text"))
    told = [asyncio.Event() for _ in body]
    told[0].set()

    async def behaviour(peer: Peer) -> None:
        await peer.request()
        await peer.say(stream_head())
        for event, heard in zip(body, told, strict=True):
            await peer.say(chunk(event))
            await heard.wait()
        await peer.say(chunk(b""))

    async with scripted(behaviour) as replica, connected(golden.url) as client, asyncio.timeout(DEADLINE_SECONDS):
        with golden.replicas(("hi", replica.url)):
            await client.say(posted(USAGE))
            await client.read_until(b"\r\n\r\n")
            for event, heard in zip(body, told, strict=True):
                assert expected(event) in await client.read_until(expected(event))
                heard.set()
            await client.read_until(b"0\r\n\r\n")
