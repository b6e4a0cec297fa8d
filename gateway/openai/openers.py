"""Openers: events of a stream that carry no content yet, and events that keep a stream open.

Engines send openers before they have done anything. As long as a replica has sent nothing else, another one can take
over, so openers are held back until content arrives; what the client gets are those of the replica that answers.

==============  ====================================================================  ===============================
grammar         openers                                                               event that keeps a stream open
==============  ====================================================================  ===============================
chunks          chunks with a role and nothing else, comments                         a comment
`/v1/messages`  `message_start`, `ping`, the start of an empty block, comments        `ping`
`/v1/responses` `response.created`, `.queued`, `.in_progress`, the start of an        `response.in_progress`, again
                empty item, comments
==============  ====================================================================  ===============================

Codex counts events as activity, but not comments. `response.in_progress` may come any number of times after
`response.created`, so both are sent when a stream of `/v1/responses` is kept open, even if nobody may answer in the
end. OpenAI's own `keepalive` event is not documented, and unknown to many clients. A replica that answers later keeps
the id of the response that was announced: SDKs raise if it changes.
"""

from collections.abc import Mapping
from typing import Any

import msgspec

from gateway.errors import INVALID_JSON, GatewayError
from gateway.openai.endpoints import Endpoint
from gateway.openai.response import CONTEXT_LENGTH_EXCEEDED
from gateway.openai.sse import KEEP_ALIVE, event_data, event_name, is_comment

PING = b'event: ping\ndata: {"type": "ping"}\n\n'
# Events that announce a response. They have the whole response object, and no part of an answer.
LIFECYCLE = frozenset({b"response.created", b"response.queued", b"response.in_progress"})
# Events that carry nothing, and those that begin a part which is empty unless it says otherwise.
_EMPTY_EVENTS = LIFECYCLE | {b"message_start", b"ping"}
_PARTS = {
    b"content_block_start": "content_block",
    b"response.output_item.added": "item",
    b"response.content_part.added": "part",
    b"response.reasoning_part.added": "part",
    b"response.reasoning_summary_part.added": "part",
}
_EMPTY_PARTS = frozenset({"text", "thinking", "message", "reasoning", "output_text", "reasoning_text", "summary_text"})
_TEXTS = ("text", "thinking", "content", "summary", "encrypted_content")

_OBJECT = msgspec.json.Decoder(dict[str, Any])


class _ChunkChoices(msgspec.Struct):
    choices: list[dict[str, Any]] = []


_CHUNK_CHOICES = msgspec.json.Decoder(_ChunkChoices)


def chunk_has_content(data: bytes) -> bool:
    """Whether a chunk carries anything of an answer; one of another form does, since what it means is not known."""
    try:
        choices = _CHUNK_CHOICES.decode(data).choices
    except INVALID_JSON:
        return True
    return not choices or any(_choice_has_content(choice) for choice in choices)


def _choice_has_content(choice: dict[str, Any]) -> bool:
    if choice.get("finish_reason") or choice.get("text"):
        return True
    delta = choice.get("delta")
    if isinstance(delta, dict):
        return any(value for key, value in delta.items() if key != "role")
    return "text" not in choice


def event_has_content(name: bytes, data: bytes) -> bool:
    """Whether a named event carries anything of an answer, or ends it."""
    if name in _EMPTY_EVENTS:
        return False
    key = _PARTS.get(name)
    if key is None:
        return True
    try:
        part = _OBJECT.decode(data).get(key)
    except INVALID_JSON:
        return True
    if not isinstance(part, dict):
        return True
    return part.get("type") not in _EMPTY_PARTS or any(part.get(text) for text in _TEXTS)


# Keeping a stream open


def announcement(openers: bytes) -> tuple[bytes, bytes]:
    """Split openers into those at the beginning that announce a response, and the rest."""
    end = 0
    while next_end := openers.find(b"\n\n", end) + 1:
        event = openers[end : next_end + 1]
        if event_name(event) not in LIFECYCLE and not is_comment(event):
            break
        end = next_end + 1
    return openers[:end], openers[end:]


def heartbeat(endpoint: Endpoint, openers: bytes) -> bytes:
    """Return an event that changes nothing, for a stream of which the client has these openers."""
    if endpoint.errors == "anthropic":
        return PING
    if endpoint.keeps_answers:
        events = [event for event in openers.split(b"\n\n") if event_name(event) in LIFECYCLE]
        if events and event_name(events[-1]) != b"response.created":
            return events[-1] + b"\n\n"
    return KEEP_ALIVE


def failed_response(error: GatewayError, announced: Mapping[str, Any]) -> bytes:
    """Encode `response.failed`, from which Codex learns the reason; `announced` is the response as it began."""
    failure = {"code": _response_code(error), "message": error.message}
    response = {**announced, "status": "failed", "error": failure}
    event = {"type": "response.failed", "sequence_number": 0, "response": response}
    return b"event: response.failed\ndata: %b\n\n" % msgspec.json.encode(event)


def _response_code(error: GatewayError) -> str:
    """Return one of the codes that the API defines for a failed response; clients decide by them whether to retry."""
    if error.code == CONTEXT_LENGTH_EXCEEDED:
        return error.code
    if error.status == 429:
        return "rate_limit_exceeded"
    return "server_error" if error.status >= 500 else "invalid_prompt"


def announced_response(openers: bytes) -> dict[str, Any]:
    """Return the response object that openers announce; empty if they announce none."""
    for event in openers.split(b"\n\n"):
        if event_name(event) in LIFECYCLE:
            try:
                response = _OBJECT.decode(event_data(event + b"\n\n")).get("response")
            except INVALID_JSON:
                return {}
            return response if isinstance(response, dict) else {}
    return {}
