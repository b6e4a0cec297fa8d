"""Which named events carry nothing, what keeps a stream open, and how a response fails."""

import json
from typing import Any

import pytest

from gateway.errors import GatewayError, Overloaded, RequestError, UpstreamError
from gateway.openai.endpoints import CHAT, MESSAGES, RESPONSES
from gateway.openai.openers import (
    PING,
    announced_response,
    announcement,
    event_has_content,
    failed_response,
    heartbeat,
)
from gateway.openai.sse import KEEP_ALIVE, event_data


def event(name: str, **fields: Any) -> bytes:
    """A named event."""
    return f"event: {name}\ndata: {json.dumps({'type': name, **fields})}\n\n".encode()


RESPONSE = {"id": "resp_1", "object": "response", "status": "in_progress", "output": []}
CREATED, IN_PROGRESS = event("response.created", response=RESPONSE), event("response.in_progress", response=RESPONSE)
ITEM = event("response.output_item.added", item={"type": "message", "content": []})


@pytest.mark.parametrize(
    "name, fields, content",
    [
        ("message_start", {"message": {}}, False),
        ("ping", {}, False),
        ("response.created", {"response": RESPONSE}, False),
        ("response.queued", {"response": RESPONSE}, False),
        ("response.in_progress", {"response": RESPONSE}, False),
        ("content_block_start", {"content_block": {"type": "text", "text": ""}}, False),
        ("content_block_start", {"content_block": {"type": "thinking", "thinking": ""}}, False),
        ("content_block_start", {"content_block": {"type": "text", "text": "a"}}, True),
        ("content_block_start", {"content_block": {"type": "tool_use", "name": "f", "input": {}}}, True),
        ("response.output_item.added", {"item": {"type": "message", "content": []}}, False),
        ("response.output_item.added", {"item": {"type": "reasoning", "summary": []}}, False),
        ("response.output_item.added", {"item": {"type": "function_call", "name": "f"}}, True),
        ("response.content_part.added", {"part": {"type": "output_text", "text": ""}}, False),
        ("response.content_part.added", {}, True),
        ("response.output_text.done", {}, True),
        ("message_delta", {}, True),
        ("message_stop", {}, True),
        ("response.completed", {}, True),
        ("", {}, True),
    ],
)
def test_what_carries_content(name: str, fields: dict[str, Any], content: bool) -> None:
    """Announcements and the beginnings of empty parts carry nothing; whatever is not known does."""
    assert event_has_content(name.encode(), json.dumps(fields).encode()) is content


def test_a_malformed_opener_is_content() -> None:
    """It is passed on as it is."""
    assert event_has_content(b"content_block_start", b"{")


@pytest.mark.parametrize(
    "openers, announced",
    [
        (b"", b""),
        (CREATED + IN_PROGRESS, CREATED + IN_PROGRESS),
        (CREATED + IN_PROGRESS + ITEM, CREATED + IN_PROGRESS),
        (KEEP_ALIVE + CREATED + ITEM, KEEP_ALIVE + CREATED),
        (ITEM + CREATED, b""),
    ],
)
def test_an_announcement(openers: bytes, announced: bytes) -> None:
    """What may be sent before it is known who answers: nothing of the answer."""
    assert announcement(openers) == (announced, openers.removeprefix(announced))


def test_heartbeats() -> None:
    """An event that changes nothing where the grammar has one, else a comment."""
    assert heartbeat(MESSAGES, b"") == PING
    assert heartbeat(CHAT, b"") == KEEP_ALIVE
    assert heartbeat(RESPONSES, b"") == KEEP_ALIVE
    assert heartbeat(RESPONSES, CREATED) == KEEP_ALIVE
    assert heartbeat(RESPONSES, CREATED + IN_PROGRESS + ITEM) == IN_PROGRESS


@pytest.mark.parametrize(
    "error, code",
    [
        (UpstreamError("no"), "server_error"),
        (Overloaded("no", retry_after_seconds=1), "rate_limit_exceeded"),
        (RequestError("no"), "invalid_prompt"),
        (RequestError("no", code="context_length_exceeded"), "context_length_exceeded"),
    ],
)
def test_a_failed_response(error: GatewayError, code: str) -> None:
    """It is the response that was announced, with a code of the API and the reason."""
    failed = json.loads(event_data(failed_response(error, announced_response(KEEP_ALIVE + CREATED))))
    expected = {**RESPONSE, "status": "failed", "error": {"code": code, "message": "no"}}
    assert (failed["type"], failed["response"]) == ("response.failed", expected)


@pytest.mark.parametrize("openers", [b"", KEEP_ALIVE, ITEM, b"event: response.created\ndata: {\n\n"])
def test_no_response_was_announced(openers: bytes) -> None:
    """There is nothing to repeat."""
    assert announced_response(openers) == {}
