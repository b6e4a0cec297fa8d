"""Anthropic's SDK, old and new: messages, streams, counting, errors in its own shape, and whether it tries again."""

import asyncio
from typing import Any

import pytest

from tests.conformance.clients import ANTHROPIC, called
from tests.conformance.rows import rows
from tests.conformance.test_openai_errors import KEYS, REPLICAS
from tests.fakes.running import FakeReplica
from tests.gateway.proxy.recorded import events, recorded
from tests.gateway.wire import Behaviour, Peer, chunk, stream_head

pytestmark = pytest.mark.asyncio(loop_scope="session")

HELLO = [{"role": "user", "content": "hello there"}]
ASKED: dict[str, Any] = {"model": "smol", "max_tokens": 64, "messages": HELLO}
TOOL = {"name": "weather", "description": "Tells it.", "input_schema": {"type": "object", "properties": {}}}
CALLING = {**ASKED, "tools": [TOOL], "tool_choice": {"type": "any"}}
SAID = "m1 heard hello there café 汉字"

CALLS: list[tuple[str, dict[str, Any]]] = [
    ("messages", ASKED),
    ("messages", {**ASKED, "stream": True}),
    ("messages", CALLING),
    ("messages", {**CALLING, "stream": True}),
    ("count_tokens", {"model": "smol", "messages": HELLO, "system": "Be kind."}),
]


@pytest.mark.parametrize("sync", [False, True], ids=["async", "sync"])
@pytest.mark.parametrize("client", ANTHROPIC)
async def test_calls(client: str, sync: bool, fake: FakeReplica) -> None:
    """The SDK's own types, the asked name, its events in their order, and a request id."""
    calls = [
        {"sdk": "anthropic", "call": call, "sync": sync, "key": "qg-all", "arguments": arguments}
        for call, arguments in CALLS
    ]
    async with rows({"smol": fake.url}, KEYS) as fleet:
        results = await called(client, fleet.url, calls)
    assert [result["error"] for result in results if "error" in result] == []
    whole, stream, tool, tools, counted = [result["items"] for result in results]
    assert whole[0]["content"][0]["text"].startswith(SAID)
    assert results[0]["request_id"].startswith("req-")
    assert [each["type"] for each in stream[:2]] == ["message_start", "content_block_start"]
    assert [each["type"] for each in stream[-3:]] == ["content_block_stop", "message_delta", "message_stop"]
    assert "".join(each["delta"].get("text") or "" for each in stream[2:-3]).startswith(SAID)
    assert whole[0]["model"] == stream[0]["message"]["model"] == "smol"
    assert whole[0]["usage"]["output_tokens"] == stream[-2]["usage"]["output_tokens"] == 16
    assert tool[0]["content"][0]["input"] == {"heard": "hello there", "café": "汉字"}
    pieces = [each["delta"]["partial_json"] for each in tools if each["type"] == "content_block_delta"]
    assert "".join(pieces) == '{"heard": "hello there", "café": "汉字"}'
    assert counted[0]["input_tokens"] > len("Be kind.")


# Model, key, changes; exception, status, the type that Anthropic gives to that status, retries, which words are told.
ERRORS: list[tuple[str, str, dict[str, Any], tuple[str, int, str, int, str]]] = [
    ("says-400", "qg-all", {}, ("BadRequestError", 400, "invalid_request_error", 0, "the engine said so")),
    ("says-400", "sk-other", {}, ("AuthenticationError", 401, "authentication_error", 0, "not known")),
    ("says-400", "qg-few", {}, ("PermissionDeniedError", 403, "permission_error", 0, "")),
    ("claude-opus", "qg-all", {}, ("NotFoundError", 404, "not_found_error", 0, "does not exist")),
    ("says-429", "qg-all", {}, ("RateLimitError", 429, "rate_limit_error", 1, "")),
    ("says-500", "qg-all", {}, ("InternalServerError", 502, "api_error", 0, "")),
    ("silent", "qg-all", {"stream": True}, ("GatewayTimeoutError", 504, "timeout_error", 0, "")),
]


@pytest.mark.parametrize("client", ANTHROPIC)
async def test_errors(client: str) -> None:
    """Anthropic's shape, exceptions and types; the SDK's own retries are steered as OpenAI's are."""
    calls = [
        {
            "sdk": "anthropic",
            "call": "messages",
            "key": key,
            "retries": 1,
            "arguments": {**ASKED, "model": model, **changes},
        }
        for model, key, changes, _ in ERRORS
    ]
    async with rows(REPLICAS, KEYS) as fleet:
        results = await called(client, fleet.url, calls)
    wrong = []
    for (model, _, _, (kind, status, shown, retries, words)), result in zip(ERRORS, results, strict=True):
        error = result.get("error") or {}
        # Older ones have no class of their own for it.
        named = error.get("class", "").replace("InternalServerError", kind if status == 504 else "InternalServerError")
        seen = (named, error.get("status_code"), error.get("retries"))
        if seen != (kind, status, retries) or shown not in error["text"] or words not in error["text"]:
            wrong.append((model, error))
        if not error.get("request_id", "").startswith("req-"):
            wrong.append((model, error))
    assert wrong == []


def broken(*pieces: bytes) -> Behaviour:
    """A stream that ends in the middle."""

    async def behaviour(peer: Peer) -> None:
        await peer.request()
        await peer.say(stream_head())
        for piece in pieces:
            await peer.say(chunk(piece))
            await asyncio.sleep(0)
        await peer.say(chunk(b""))

    return behaviour


EVENTS = events(recorded("messages-text"))
FAILED = b'event: error\ndata: {"type":"error","error":{"type":"internal_error","message":"secret"}}\n\n'


@pytest.mark.parametrize("client", ANTHROPIC)
async def test_streams_that_break(client: str) -> None:
    """Cut off, or with vLLM's error in it: an exception, not a message that is too short."""
    behaviours = {"cut": broken(*EVENTS[:4]), "failed": broken(*EVENTS[:4], FAILED), "whole": broken(*EVENTS)}
    calls = [
        {"sdk": "anthropic", "call": "messages", "arguments": {**ASKED, "model": name, "stream": True}}
        for name in behaviours
    ]
    async with rows(behaviours) as fleet:
        cut, failed, whole = await called(client, fleet.url, calls)
    assert len(cut["items"]) == len(failed["items"]) == 4
    assert "APIStatusError" in cut["error"]["class"] or "InternalServerError" in cut["error"]["class"]
    assert "secret" not in failed["error"]["text"]
    assert "error" not in whole
    assert whole["items"][-1]["type"] == "message_stop"
