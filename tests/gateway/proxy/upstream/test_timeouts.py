"""The timeouts of an alias: how long a reply may take; 0 is no limit."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from typing import Any

import httpx
import pytest

from config.schema import TimeoutSettings
from gateway.routing.target import reply_timeouts
from tests.fakes.running import HOST
from tests.gateway.fleet import HELLO, STREAM, Fleet, deployment, error_of, running_gateway
from tests.gateway.proxy.recorded import WHOLE, events, expected, recorded
from tests.gateway.wire import Behaviour, Peer, chunk, scripted, stream_head, whole

pytestmark = pytest.mark.asyncio(loop_scope="session")

NEVER = {"first_byte_seconds": 0, "idle_seconds": 0, "total_seconds": 0, "heartbeat_seconds": 0}
SHORT_SECONDS = 0.2
EVENTS = events(recorded("text"))


@asynccontextmanager
async def asking(
    behaviour: Behaviour, body: dict[str, Any], **timeouts: float
) -> AsyncIterator["asyncio.Task[httpx.Response]"]:
    """Ask a gateway with these timeouts only, in front of a replica with a behaviour."""
    alias = {"ladder": ["hi"], "timeouts": {**NEVER, **timeouts}}
    async with running_gateway(deployment({"aliases": {"smol": alias}})) as fleet, scripted(behaviour) as replica:
        with fleet.replicas(("hi", replica.url)):
            yield asyncio.create_task(fleet.ask(body))
            await fleet.at_rest()


def sends(*pieces: bytes) -> Behaviour:
    """Send these pieces, and then nothing."""

    async def behaviour(peer: Peer) -> None:
        await peer.request()
        for piece in pieces:
            await peer.say(piece)
        await peer.left()

    return behaviour


async def sends_forever(peer: Peer) -> None:
    """Send an event now and then, without an end."""
    await peer.request()
    await peer.say(stream_head() + chunk(EVENTS[0]))
    while True:
        await peer.say(chunk(EVENTS[1]))
        await asyncio.sleep(SHORT_SECONDS / 10)


FIRST = stream_head() + chunk(EVENTS[0]) + chunk(EVENTS[1])


@pytest.mark.parametrize(
    "option, body, behaviour, words, begun",
    [
        ("first_byte_seconds", STREAM, sends(), "sent nothing for", False),
        ("first_byte_seconds", STREAM, sends(stream_head()), "sent nothing for", False),
        ("idle_seconds", STREAM, sends(FIRST), "sent nothing more for", True),
        ("total_seconds", STREAM, sends(), "not complete after", False),
        ("total_seconds", STREAM, sends(FIRST), "not complete after", True),
        ("total_seconds", STREAM, sends_forever, "not complete after", True),
        ("total_seconds", HELLO, sends(), "not complete after", False),
        ("total_seconds", HELLO, sends(whole(WHOLE)[:-5]), "not complete after", False),
    ],
)
async def test_a_timeout(option: str, body: dict[str, Any], behaviour: Behaviour, words: str, begun: bool) -> None:
    """The error says which it was: by a status, or in the stream that has begun."""
    async with asking(behaviour, body, **{option: SHORT_SECONDS}) as task:
        answer = await task
        if begun:
            assert answer.content.startswith(expected(EVENTS[0] + EVENTS[1]))
            assert b'"code": "upstream_timeout"' in answer.content
            assert words.encode() in answer.content
        else:
            assert answer.status_code == 504
            assert words in error_of(answer)["message"]


@pytest.mark.parametrize("body", [HELLO, STREAM], ids=["unary", "stream"])
async def test_a_connection_that_is_not_accepted(body: dict[str, Any]) -> None:
    """A listener with a full backlog accepts none: `connect_seconds` limits that."""
    async with full_listener() as url, fleet_with_replica(url) as fleet:
        answer = await fleet.ask(body)
    assert answer.status_code == 502
    assert error_of(answer)["code"] == "upstream_unreachable"


@asynccontextmanager
async def fleet_with_replica(url: str) -> AsyncIterator[Fleet]:
    """A gateway with a replica at a url, and little time to connect to it."""
    alias = {"ladder": ["hi"], "timeouts": {**NEVER, "connect_seconds": SHORT_SECONDS}}
    async with running_gateway(deployment({"aliases": {"smol": alias}})) as fleet:
        with fleet.replicas(("hi", url)):
            yield fleet


@pytest.mark.parametrize("stream", [False, True])
async def test_0_is_no_limit(stream: bool) -> None:
    """A timeout of 0 is infinite; a unary answer has only the total."""
    unlimited = reply_timeouts(TimeoutSettings(**NEVER), stream=stream)
    assert {unlimited.first_byte_seconds, unlimited.idle_seconds, unlimited.total_seconds} == {float("inf")}
    assert unlimited.connect_seconds == 2.0
    some = reply_timeouts(TimeoutSettings(first_byte_seconds=1, idle_seconds=2, total_seconds=3), stream=stream)
    limits = (some.first_byte_seconds, some.idle_seconds, some.total_seconds)
    assert limits == ((1, 2, 3) if stream else (3, 3, 3))


@asynccontextmanager
async def full_listener() -> AsyncIterator[str]:
    """A port that listens, and whose backlog is full."""
    with socket.socket() as listening:
        listening.bind((HOST, 0))
        listening.listen(0)
        address = listening.getsockname()
        with ExitStack() as stack:
            for _ in range(4):
                waiting = stack.enter_context(socket.socket())
                waiting.setblocking(False)
                waiting.connect_ex(address)
            yield f"http://{HOST}:{address[1]}"
