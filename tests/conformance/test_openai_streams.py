"""What the SDK makes of a stream when the replica misbehaves: right through the gateway, where it isn't without."""

import asyncio
from dataclasses import dataclass

import pytest

from tests.conformance.clients import OPENAI, called, text_of
from tests.conformance.rows import rows
from tests.gateway.proxy.recorded import WHOLE, events, recorded
from tests.gateway.wire import Behaviour, Peer, chunk, stream_head, whole

pytestmark = pytest.mark.asyncio(loop_scope="session")

HELLO = [{"role": "user", "content": "hello there"}]
EVENTS = events(recorded("text"))
TEXT = 'Der Bär schläft。汉字 👩‍👩‍👧 "model":"m1"\\n\n\n'
BEGUN, SAID = EVENTS[:3], "Der Bär"
FAILED = b'{"error":{"message":"secret","type":"InternalServerError","param":null,"code":500}}'


def streaming(*pieces: bytes, end: bytes = chunk(b"")) -> Behaviour:
    """Send a stream in pieces that are read one by one, and close."""

    async def behaviour(peer: Peer) -> None:
        await peer.request()
        await peer.say(stream_head())
        for piece in pieces:
            await peer.say(chunk(piece))
            for _ in range(3):
                await asyncio.sleep(0)
        await peer.say(end)

    return behaviour


def answering(data: bytes) -> Behaviour:
    """Answer once."""

    async def behaviour(peer: Peer) -> None:
        await peer.request()
        await peer.say(data)

    return behaviour


def stalling(*pieces: bytes) -> Behaviour:
    """Send some, and then nothing."""
    begin = streaming(*pieces, end=b"")

    async def behaviour(peer: Peer) -> None:
        await begin(peer)
        await peer.left()

    return behaviour


@dataclass(frozen=True, slots=True)
class Row:
    """What the replica sends, and what an application sees: text, and an exception's class and code if there is one."""

    sends: Behaviour
    text: str = TEXT
    error: str | None = None
    code: str | None = None


def broken(sends: Behaviour, code: str) -> Row:
    """An answer that breaks off is an exception."""
    return Row(sends, SAID, "APIError", code)


CRLF = [event.replace(b"\n", b"\r\n") for event in EVENTS]
ROWS = {
    "comments": Row(streaming(b": first\n\n", *(b": keep-alive\n\n" + event for event in EVENTS))),
    "crlf": Row(streaming(*CRLF)),
    "crlf-cut": Row(streaming(*(half for event in CRLF for half in (event[:-1], event[-1:])))),
    "done-then-more": Row(streaming(*EVENTS, EVENTS[1], b"data: nonsense\n\n")),
    "empty-events": Row(streaming(b"event: ping\n\n", EVENTS[0], b"id: 7\n\n", *EVENTS[1:])),
    "error": broken(streaming(*BEGUN, b"data: " + FAILED + b"\n\n"), "upstream_error"),
    "error-and-done": broken(streaming(*BEGUN, b"data: " + FAILED + b"\n\n" + EVENTS[-1]), "upstream_error"),
    "named-error": broken(streaming(*BEGUN, b"event: error\ndata: " + FAILED + b"\n\n"), "upstream_error"),
    "error-without-key": broken(streaming(*BEGUN, b'event: error\ndata: {"message":"secret"}\n\n'), "upstream_error"),
    "clean-close": broken(streaming(*BEGUN), "upstream_disconnected"),
    "done-without-reason": broken(streaming(*BEGUN, EVENTS[-1]), "upstream_disconnected"),
    "abrupt-close": broken(streaming(*BEGUN, end=b""), "upstream_disconnected"),
    "stall": broken(stalling(*BEGUN), "upstream_timeout"),
    "json": Row(answering(whole(WHOLE)), "", "InternalServerError", "upstream_invalid"),
    "json-error": Row(answering(whole(FAILED)), "", "InternalServerError", "upstream_invalid"),
    "nothing": Row(streaming(), "", "InternalServerError", "upstream_disconnected"),
}


@pytest.mark.parametrize("sync", [False, True], ids=["async", "sync"])
@pytest.mark.parametrize("client", OPENAI)
async def test_streams(client: str, sync: bool) -> None:
    """Every row, by one process."""
    calls = [
        {"sdk": "openai", "call": "chat", "sync": sync, "arguments": {"model": name, "messages": HELLO, "stream": True}}
        for name in ROWS
    ]
    async with rows({name: row.sends for name, row in ROWS.items()}) as fleet:
        results = await called(client, fleet.url, calls)
    wrong = {
        name: (result.get("error"), text_of(result["items"]))
        for (name, row), result in zip(ROWS.items(), results, strict=True)
        if (text_of(result["items"]), *raised(result)) != (row.text, row.error, row.code)
    }
    assert wrong == {}
    assert all(chunk["model"] in ROWS for result in results for chunk in result["items"])
    assert not any("secret" in result["error"]["text"] for result in results if "error" in result)


def raised(result: dict[str, dict[str, str]]) -> tuple[str | None, str | None]:
    """Class and code of the exception, if any."""
    error = result.get("error")
    return (error["class"], error["code"]) if error else (None, None)
