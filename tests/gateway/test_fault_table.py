"""Every way in which a replica fails, whole and streamed, alone and with a healthy one behind it: what the client sees.

Before the first byte a healthy replica's answer is perfect; after it, the stream ends with an error that SDKs raise.
"""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from tests.fakes.running import HOST
from tests.gateway.fleet import CHAT, HELLO, STREAM, Fleet, deployment, error_of, running_gateway
from tests.gateway.proxy.recorded import WHOLE, events, expected, recorded
from tests.gateway.wire import Behaviour, Peer, chunk, scripted, stream, stream_head, whole

pytestmark = pytest.mark.asyncio(loop_scope="session")

# Short, since the rows below wait for them; long enough for a machine that is busy.
PATIENCE = {"connect_seconds": 2, "first_byte_seconds": 0.4, "idle_seconds": 0.4, "total_seconds": 1.2}
TIMEOUTS = {**PATIENCE, "queue_seconds": 0.4, "heartbeat_seconds": 0}
ALIASES = {"smol": {"ladder": ["hi", "mid"], "timeouts": TIMEOUTS}}

EVENTS = events(recorded("text"))
DONE = EVENTS[-1]
PERFECT = expected(recorded("text"), usage=False)
NO_RETRY = {"x-should-retry": "false"}


def says(data: bytes, then: Callable[[Peer], Awaitable[None]] | None = None) -> Behaviour:
    """Read a request, say this, and go on with that, or close."""

    async def behaviour(peer: Peer) -> None:
        await peer.request()
        if data:
            await peer.say(data)
        if then is not None:
            await then(peer)

    return behaviour


async def reset(peer: Peer) -> None:
    """Break the connection when what was said has been read."""
    for _ in range(3):
        await asyncio.sleep(0)
    peer.reset()


async def stall(peer: Peer) -> None:
    """Say no more, for as long as the other side listens."""
    await peer.left()


def failure(status: str, message: str = "secret", kind: str = "InternalServerError") -> bytes:
    """An error in vLLM's shape."""
    error = {"message": message, "type": kind, "param": None, "code": int(status[:3])}
    return whole(json.dumps({"error": error}).encode(), status)


def event(error: dict[str, Any]) -> bytes:
    """An error event as vLLM writes it."""
    return b"data: " + json.dumps({"error": error}, separators=(",", ":")).encode() + b"\n\n"


async def nobody(_: Peer) -> None:
    """Not played: there is nothing that listens."""


DEAD = event({"message": "secret", "type": "InternalServerError", "param": None, "code": 500})
ABORTED = EVENTS[1].replace(b'"finish_reason":null', b'"finish_reason":"abort"')
HEAD = whole(WHOLE)[:-9]
BEGUN = stream_head() + chunk(EVENTS[0]) + chunk(EVENTS[1])


@dataclass(frozen=True, slots=True)
class Row:
    """A fault before the client has seen anything: how it looks whole and streamed, and what is told of it."""

    name: str
    unary: Behaviour
    stream: Behaviour
    status: int = 502
    code: str = "upstream_error"
    stream_code: str = ""  # if it is another one
    full: bool = False  # no failure: the replica is asked again while the client waits, and the client may come back


def same(
    name: str, behaviour: Behaviour, status: int = 502, code: str = "upstream_error", *, full: bool = False
) -> Row:
    """A fault that looks the same either way."""
    return Row(name, behaviour, behaviour, status, code, full=full)


ENDED = "upstream_disconnected"
BEFORE = (
    same("500", says(failure("500 Internal Server Error"))),
    same("500 shutdown", says(failure("500 Internal Server Error", "cannot schedule new futures after shutdown"))),
    same("502 html", says(whole(b"<html>secret</html>", "502 Bad Gateway", "text/html"))),
    same("503", says(failure("503 Service Unavailable")), 429, "queue_timeout", full=True),
    same("429", says(failure("429 Too Many Requests")), 429, "queue_timeout", full=True),
    same("504", says(failure("504 Gateway Timeout"))),
    Row("empty 200", says(whole(b"")), says(stream()), code="upstream_invalid", stream_code=ENDED),
    Row("200 [DONE] only", says(whole(b"null")), says(stream(DONE)), code="upstream_invalid", stream_code=ENDED),
    same("garbage", says(b"\x16\x03\x01 no HTTP at all\r\n\r\n"), code="upstream_disconnected"),
    same("reset before headers", says(b"", reset), code="upstream_disconnected"),
    same("close before headers", says(b""), code="upstream_disconnected"),
    Row("reset after headers", says(HEAD, reset), says(stream_head(), reset), code="upstream_disconnected"),
    Row("close after headers", says(HEAD), says(stream_head()), code="upstream_disconnected"),
    same("connection refused", nobody, code="upstream_unreachable"),
    same("stall before headers", says(b"", stall), 504, "upstream_timeout"),
    Row("stall after headers", says(HEAD, stall), says(stream_head(), stall), 504, "upstream_timeout"),
    Row("error event first", says(whole(b'{"error":{"message":"secret"}}')), says(stream(DEAD, DONE))),
    Row(
        "abort first",
        says(whole(WHOLE.replace(b'"finish_reason":"stop"', b'"finish_reason":"abort"'))),
        says(stream(ABORTED, DONE)),
        code="upstream_aborted",
    ),
    Row("wrong content type", says(stream(*EVENTS)), says(whole(WHOLE)), code="upstream_invalid"),
    Row(
        "not JSON",
        says(whole(b"<html>secret</html>")),
        says(whole(b"<html>secret</html>", kind="text/html")),
        code="upstream_invalid",
    ),
)

# What comes when the client has got the first events, how the connection goes on, and the code that is told.
AFTER: dict[str, tuple[bytes, Callable[[Peer], Awaitable[None]] | None, str]] = {
    "stall": (b"", stall, "upstream_timeout"),
    "clean close without an end": (chunk(b""), None, "upstream_disconnected"),
    "clean close behind half an event": (chunk(EVENTS[2][:9]) + chunk(b""), None, "upstream_disconnected"),
    "[DONE] without a finish reason": (chunk(DONE) + chunk(b""), None, "upstream_disconnected"),
    "abrupt close": (b"", None, "upstream_disconnected"),
    "abrupt close behind half an event": (chunk(EVENTS[2][:9]), None, "upstream_disconnected"),
    "reset": (b"", reset, "upstream_disconnected"),
    "no chunk": (b"no chunk\r\n", None, "upstream_disconnected"),
    "error event": (chunk(DEAD), stall, "upstream_error"),
    "error event and [DONE]": (chunk(DEAD + DONE) + chunk(b""), None, "upstream_error"),
    "named error event": (chunk(b"event: error\n" + DEAD) + chunk(b""), None, "upstream_error"),
    "abort": (chunk(ABORTED), stall, "upstream_aborted"),
    "abort and [DONE]": (chunk(ABORTED + DONE) + chunk(b""), None, "upstream_aborted"),
}


@asynccontextmanager
async def healthy(asked: list[bytes]) -> AsyncIterator[str]:
    """A replica that does everything right, and notes what it is asked."""

    async def behaviour(peer: Peer) -> None:
        while True:
            asked.append(await peer.request())
            await peer.say(stream(*EVENTS) if b'"stream":true' in asked[-1].replace(b" ", b"") else whole(WHOLE))

    async with scripted(behaviour) as replica:
        yield replica.url


@asynccontextmanager
async def failing(behaviour: Behaviour, asked: list[bytes]) -> AsyncIterator[str]:
    """A replica that fails in this way each time, and notes what it is asked."""

    async def noting(peer: Peer) -> None:
        request = peer.request

        async def noted() -> bytes:
            asked.append(await request())
            return asked[-1]

        peer.request = noted  # type: ignore[method-assign]
        await behaviour(peer)

    if behaviour is nobody:
        with socket.socket() as taken:  # bound, and nobody listens
            taken.bind((HOST, 0))
            yield f"http://{HOST}:{taken.getsockname()[1]}"
        return
    async with scripted(noting) as replica:
        yield replica.url


@dataclass(frozen=True, slots=True)
class Seen:
    """What came of one request: the answer, and how often each replica was asked for it."""

    answer: httpx.Response
    failing: int
    healthy: int


async def seen(
    behaviour: Behaviour, body: dict[str, Any], *, spare: bool, heard: Callable[[], None] = lambda: None
) -> Seen:
    """Ask a gateway in front of a failing replica, and of a healthy one on the rung below if there is a spare.

    `heard` is called when the second event of a stream has come.
    """
    bad: list[bytes] = []
    good: list[bytes] = []
    async with AsyncExitStack() as stack:
        fleet: Fleet = await stack.enter_async_context(running_gateway(deployment({"aliases": ALIASES})))
        served = [("hi", await stack.enter_async_context(failing(behaviour, bad)))]
        if spare:
            served.append(("mid", await stack.enter_async_context(healthy(good))))
        with fleet.replicas(*served):
            async with fleet.client.stream("POST", CHAT, json=body) as answer:
                content = b""
                async for data in answer.aiter_raw():
                    content += data
                    if content.count(b"\n\n") >= 2:
                        heard()
            await fleet.at_rest()
    read = httpx.Response(answer.status_code, headers=answer.headers, content=content)
    return Seen(read, len(bad), len(good))


def told_in(body: bytes) -> tuple[bytes, dict[str, Any]]:
    """Split a stream into what came before, and the error at its end."""
    before, found, last = body.rpartition(b'data: {"error": ')
    assert found, body
    error: dict[str, Any] = json.loads(b'{"error": ' + last)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "secret" not in error["message"]
    return before, error


@pytest.mark.parametrize("body", [HELLO, STREAM], ids=["unary", "stream"])
@pytest.mark.parametrize("row", BEFORE, ids=lambda row: row.name)
async def test_alone_before_the_first_byte(row: Row, body: dict[str, Any]) -> None:
    """A status that says whose fault it was, a code, and whether to come back; nothing of what the replica said."""
    got = await seen(row.stream if body is STREAM else row.unary, body, spare=False)
    error = error_of(got.answer)
    code = row.stream_code if body is STREAM and row.stream_code else row.code
    assert (got.answer.status_code, error["code"]) == (row.status, code)
    assert b"secret" not in got.answer.content
    assert got.answer.headers["x-should-retry"] == ("true" if row.full else "false")
    if row.full:
        assert 1 <= int(got.answer.headers["retry-after"]) <= 120
        assert got.failing >= 1
    else:
        assert "retry-after" not in got.answer.headers
        assert got.failing == (0 if row.name == "connection refused" else 1)


@pytest.mark.parametrize("body", [HELLO, STREAM], ids=["unary", "stream"])
@pytest.mark.parametrize("row", BEFORE, ids=lambda row: row.name)
async def test_with_a_spare_before_the_first_byte(row: Row, body: dict[str, Any]) -> None:
    """The client gets a perfect answer and is told that it took two attempts; each replica was asked once."""
    got = await seen(row.stream if body is STREAM else row.unary, body, spare=True)
    assert got.answer.status_code == 200, got.answer.text
    if body is STREAM:
        assert got.answer.content == PERFECT
    else:
        assert got.answer.content == WHOLE.replace(b'"m1"', b'"smol"', 1)
    assert got.answer.headers["x-quantgate-attempts"] == "2"
    assert got.answer.headers["x-quantgate-variant"] == "mid"
    assert (got.failing, got.healthy) == (0 if row.name == "connection refused" else 1, 1)


@pytest.mark.parametrize("spare", [False, True], ids=["alone", "with a spare"])
@pytest.mark.parametrize("name", AFTER)
async def test_after_the_first_byte(name: str, spare: bool) -> None:
    """What came before stays, the stream ends orderly with an error and without `[DONE]`, and nobody is asked again."""
    rest, then, code = AFTER[name]
    heard = asyncio.Event()

    async def go_on(peer: Peer) -> None:
        await heard.wait()
        if rest:
            await peer.say(rest)
        if then is not None:
            await then(peer)

    got = await seen(says(BEGUN, go_on), STREAM, spare=spare, heard=heard.set)
    assert got.answer.status_code == 200
    before, error = told_in(got.answer.content)
    assert before == expected(EVENTS[0] + EVENTS[1])
    assert error["code"] == code
    assert DONE not in got.answer.content
    assert (got.failing, got.healthy) == (1, 0)


async def test_a_stream_that_fails_behind_its_end_is_whole() -> None:
    """Once `[DONE]` has come, the answer is whole, whatever happens to the connection."""
    got = await seen(says(stream_head() + b"".join(map(chunk, EVENTS)), reset), STREAM, spare=True)
    assert got.answer.content == PERFECT
    assert (got.failing, got.healthy) == (1, 0)


@pytest.mark.parametrize("status", ["400 Bad Request", "422 Unprocessable Entity", "413 Too Large"])
async def test_what_the_client_did_wrong_is_not_tried_elsewhere(status: str) -> None:
    """The replica's own words come back, and the spare isn't asked."""
    refused = says(failure(status, "max_tokens is too large", "BadRequestError"))
    got = await seen(refused, HELLO, spare=True)
    assert got.answer.status_code == int(status[:3])
    assert error_of(got.answer)["message"] == "max_tokens is too large"
    assert (got.failing, got.healthy) == (1, 0)
