"""Events that carry nothing commit a stream to no replica, and no stream is silent: over sockets, in every grammar."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from openai import AsyncOpenAI

from tests.fakes.running import DEADLINE_SECONDS, eventually
from tests.gateway.fleet import CHAT, STREAM, TEXT, Fleet, deployment, error_of, running_gateway
from tests.gateway.proxy.recorded import events, expected, recorded
from tests.gateway.wire import Behaviour, Peer, chunk, scripted, stream_head

pytestmark = pytest.mark.asyncio(loop_scope="session")

RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
EVERY_SECONDS = 0.05
COMMENT, PING = b": keep-alive\n\n", b'event: ping\ndata: {"type": "ping"}\n\n'

CHAT_EVENTS = events(recorded("text"))
RESPONSE_EVENTS = events(recorded("responses-text"))
MESSAGE_EVENTS = events(recorded("messages-text"))
TEXT_EVENTS = [
    b'data: {"id":"c","model":"m1","choices":[{"index":0,"text":"","finish_reason":null}]}\n\n',
    b'data: {"id":"c","model":"m1","choices":[{"index":0,"text":" a","finish_reason":null}]}\n\n',
    b'data: {"id":"c","model":"m1","choices":[{"index":0,"text":"","finish_reason":"length"}]}\n\n',
    b"data: [DONE]\n\n",
]
SPACED_ROLE = b'data: {"model": "m1", "choices": [{"index": 0, "delta": {"role": "assistant", "content": null}}]}\n\n'

BODIES: dict[str, dict[str, Any]] = {
    CHAT: STREAM,
    TEXT: {"model": "smol", "prompt": "a", "stream": True},
    RESPONSES: {"model": "smol", "input": "a", "stream": True},
    MESSAGES: {"model": "smol", "max_tokens": 9, "messages": [{"role": "user", "content": "a"}], "stream": True},
}
# A path, the events of a whole stream, and how many of them carry nothing.
GRAMMARS = {
    "chat": (CHAT, CHAT_EVENTS, 1),
    "chat of another engine": (CHAT, [SPACED_ROLE, *CHAT_EVENTS[1:]], 1),
    "chat behind comments": (CHAT, [b": keep-alive\n\n", b": keep-alive\n\n", *CHAT_EVENTS], 3),
    "completions": (TEXT, TEXT_EVENTS, 1),
    "responses": (RESPONSES, RESPONSE_EVENTS, 4),
    "messages": (MESSAGES, MESSAGE_EVENTS, 2),
}


@asynccontextmanager
async def gateway_with(heartbeat_seconds: float = EVERY_SECONDS) -> AsyncIterator[Fleet]:
    """Run a gateway with this heartbeat."""
    timeouts = {"heartbeat_seconds": heartbeat_seconds}
    aliases = {
        "smol": {"ladder": ["hi", "mid"], "timeouts": timeouts},
        "other": {"ladder": ["mid"], "timeouts": timeouts},
    }
    async with running_gateway(deployment({"aliases": aliases})) as fleet:
        yield fleet
        await fleet.at_rest()


def says(first: list[bytes], go: asyncio.Event | None = None, rest: list[bytes] | None = None) -> Behaviour:
    """Send events, then the rest once the event is set; without a rest the connection breaks."""

    async def behaviour(peer: Peer) -> None:
        await peer.request()
        await peer.say(stream_head() + b"".join(map(chunk, first)))
        if go is not None:
            await go.wait()
        if rest is None:
            peer.reset()
        else:
            await peer.say(b"".join(map(chunk, rest)) + chunk(b""))
            await peer.left()

    return behaviour


async def beaten(fleet: Fleet, times: int = 3) -> None:
    """Wait until this many heartbeats were sent."""
    await eventually(lambda: _beats(fleet, times))


async def _beats(fleet: Fleet, times: int) -> bool:
    return await fleet.total("quantgate_heartbeats_total") >= times


def client_gets(path: str, sent: list[bytes]) -> bytes:
    """What a client gets for the events of a replica."""
    if path == TEXT:
        return b"".join(sent).replace(b'"m1"', b'"smol"')
    comments = [event for event in sent if event.startswith(b":")]
    spaced = b"".join(sent[len(comments) :]).replace(b'"model": "m1"', b'"model": "smol"')
    return b"".join(comments) + (expected(spaced, usage=False) if path == CHAT else expected(spaced))


@pytest.mark.parametrize("name", GRAMMARS)
async def test_a_replica_that_dies_behind_its_openers(name: str) -> None:
    """Another one answers, with openers of its own; the client sees nothing of the first."""
    path, sent, openers = GRAMMARS[name]
    go = asyncio.Event()
    go.set()
    async with (
        gateway_with(heartbeat_seconds=0) as fleet,
        scripted(says(sent[:openers])) as dying,
        scripted(says(sent, go, [])) as healthy,
    ):
        with fleet.replicas(("hi", dying.url), ("mid", healthy.url)):
            answer = await fleet.ask(BODIES[path], path=path)
    assert answer.status_code == 200
    assert answer.content == client_gets(path, sent)
    assert (answer.headers["x-quantgate-replica"], answer.headers["x-quantgate-attempts"]) == ("mid-1", "2")


@pytest.mark.parametrize("name", GRAMMARS)
async def test_openers_of_a_replica_that_dies_alone(name: str) -> None:
    """Nothing was sent, so the client gets a status."""
    path, sent, openers = GRAMMARS[name]
    async with gateway_with(heartbeat_seconds=0) as fleet, scripted(says(sent[:openers])) as dying:
        with fleet.replicas(("hi", dying.url)):
            answer = await fleet.ask(BODIES[path], path=path)
    assert answer.status_code == 502
    if path != MESSAGES:
        assert error_of(answer)["code"] == "upstream_disconnected"


@pytest.mark.parametrize("name", GRAMMARS)
async def test_content_is_final(name: str) -> None:
    """The first event with content commits the stream: its failure is an error event."""
    path, sent, openers = GRAMMARS[name]
    async with (
        gateway_with(heartbeat_seconds=0) as fleet,
        scripted(says(sent[: openers + 1])) as dying,
        scripted(says(sent)) as healthy,
    ):
        with fleet.replicas(("hi", dying.url), ("mid", healthy.url)):
            answer = await fleet.ask(BODIES[path], path=path)
    assert answer.content.startswith(client_gets(path, sent[: openers + 1]))
    assert b"upstream_disconnected" in answer.content
    assert answer.headers["x-quantgate-attempts"] == "1"


def is_beat(path: str) -> Callable[[bytes], bool]:
    """Recognise the heartbeats of a grammar."""
    if path == MESSAGES:
        return lambda event: event == PING
    if path == RESPONSES:
        return lambda event: event.startswith(b"event: response.in_progress\n")
    return lambda event: event == COMMENT


@pytest.mark.parametrize("name", ["chat", "completions", "responses", "messages"])
@pytest.mark.parametrize("behind", ["openers", "content"])
async def test_a_silent_stream_is_kept_open(name: str, behind: str) -> None:
    """Whenever nothing goes out there are heartbeats, also behind the first token; the answer is complete."""
    path, sent, openers = GRAMMARS[name]
    begin = openers + (1 if behind == "content" else 0)
    go = asyncio.Event()
    async with gateway_with() as fleet, scripted(says(sent[:begin], go, sent[begin:])) as replica:
        with fleet.replicas(("hi", replica.url)):
            asking = asyncio.create_task(fleet.ask(BODIES[path], path=path))
            await beaten(fleet)
            go.set()
            got = events((await asking).content)
    beat = is_beat(path)
    assert len([event for event in got if beat(event)]) >= 3
    told = [event for event in got if not beat(event) and not event.startswith(b": quantgate ")]
    wanted = [event for event in events(client_gets(path, sent)) if not beat(event)]
    assert told == wanted
    if path == RESPONSES and behind == "openers":
        assert got[0].startswith(b"event: response.created\n"), "a comment is no activity for Codex"


async def test_heartbeats_end_with_the_stream() -> None:
    """Behind the last event of a stream none follows, although its connection to the replica is still open."""
    go = asyncio.Event()

    async def behaviour(peer: Peer) -> None:
        await peer.request()
        await peer.say(stream_head() + b"".join(map(chunk, CHAT_EVENTS)))
        await go.wait()
        await peer.say(chunk(b""))
        await peer.left()

    waiting = says(CHAT_EVENTS[:1], go, CHAT_EVENTS[1:])
    async with gateway_with() as fleet, scripted(behaviour) as ended, scripted(waiting) as silent:
        with fleet.replicas(("hi", ended.url)):
            asking = asyncio.create_task(fleet.ask(STREAM))
            await eventually(lambda: ended.peers)
            with fleet.replicas(("mid", silent.url)):
                # Another stream counts the heartbeats meanwhile.
                beating = asyncio.create_task(fleet.ask({**STREAM, "model": "other"}))
                await beaten(fleet)
                go.set()
                await beating
            content = (await asking).content
    assert content == client_gets(CHAT, CHAT_EVENTS)


async def test_the_sdk_reads_a_response_that_changed_its_replica() -> None:
    """It was announced by one replica and is answered by another: one id, one beginning, one end."""
    go = asyncio.Event()
    other = [event.replace(b"resp_9f3c", b"resp_other") for event in RESPONSE_EVENTS]
    async with (
        gateway_with() as fleet,
        scripted(says(RESPONSE_EVENTS[:2], go)) as dying,
        scripted(says(other, go, [])) as healthy,
    ):
        with fleet.replicas(("hi", dying.url), ("mid", healthy.url)):
            async with AsyncOpenAI(base_url=f"{fleet.url}/v1", api_key="any", max_retries=0) as client:
                kinds: list[str] = []
                async with client.responses.stream(model="smol", input="a") as stream:
                    reading = asyncio.create_task(_read(stream, kinds))
                    await beaten(fleet)
                    go.set()
                    async with asyncio.timeout(DEADLINE_SECONDS):
                        await reading
                    final = await stream.get_final_response()
    assert (final.id, final.model, final.status) == ("resp_9f3c", "smol", "completed")
    assert kinds.count("response.created") == 1
    assert kinds[-1] == "response.completed"


async def _read(stream: Any, kinds: list[str]) -> None:
    kinds.extend([event.type async for event in stream])


@pytest.mark.parametrize("announced", [True, False])
async def test_a_response_that_fails(announced: bool) -> None:
    """Behind the error that SDKs raise comes the failed response, with what was announced and the reason."""
    go = asyncio.Event()
    behaviour = says(RESPONSE_EVENTS[:5] if announced else [], go)
    async with gateway_with() as fleet, scripted(behaviour) as dying:
        with fleet.replicas(("hi", dying.url)):
            body = BODIES[RESPONSES]
            asking = asyncio.create_task(fleet.ask(body, {"x-request-id": "r-1"}, path=RESPONSES))
            await beaten(fleet)
            go.set()
            *_, error, failed = events((await asking).content)
    assert error.startswith(b"event: error\n")
    assert failed.startswith(b"event: response.failed\n")
    response = json.loads(failed.partition(b"data: ")[2])["response"]
    assert response["id"] == ("resp_9f3c" if announced else "resp_r-1")
    assert (response["object"], response["model"], response["status"]) == ("response", "smol", "failed")
    assert response["error"]["code"] == "server_error"
    assert "closed the connection" in response["error"]["message"]


@pytest.mark.parametrize(
    "refusal, kind",
    [
        (b'{"type":"error","error":{"type":"BadRequestError","message":"too long"}}', "invalid_request_error"),
        (None, "api_error"),
    ],
)
async def test_errors_in_a_stream_of_messages(refusal: bytes | None, kind: str) -> None:
    """They have Anthropic's types, as outside a stream."""
    go = asyncio.Event()

    async def behaviour(peer: Peer) -> None:
        await peer.request()
        await go.wait()
        if refusal is not None:
            head = b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
            await peer.say(head % len(refusal) + refusal)

    async with gateway_with() as fleet, scripted(behaviour) as replica:
        with fleet.replicas(("hi", replica.url)):
            asking = asyncio.create_task(fleet.ask(BODIES[MESSAGES], path=MESSAGES))
            await beaten(fleet)
            go.set()
            answer = await asking
    *before, error = events(answer.content)
    assert set(before) == {PING}
    assert json.loads(error.partition(b"data: ")[2])["error"]["type"] == kind


async def test_every_choice_must_end() -> None:
    """A stream in which one of three choices never ended is no whole answer."""
    both = events(recorded("choices"))
    ending = next(event for event in both if b'"index":1' in event and b'"finish_reason":null' not in event)
    sent = [event for event in both if event != ending]
    body = {**STREAM, "n": 3}
    go = asyncio.Event()
    go.set()
    async with gateway_with() as fleet, scripted(says(both, go, [])) as whole, scripted(says(sent, go, [])) as cut:
        with fleet.replicas(("hi", whole.url)):
            assert (await fleet.ask(body)).content.endswith(b"data: [DONE]\n\n")
        with fleet.replicas(("hi", cut.url)):
            content = (await fleet.ask(body)).content
    assert b"[DONE]" not in content
    assert b"upstream_disconnected" in content
