"""Anthropic's dialect as vLLM speaks it: a chat's answer in blocks, each event with its name."""

import json
import uuid
from collections.abc import Iterator
from typing import Any

from tests.fakes import answers
from tests.fakes.asks import Ask

STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


def opening(ask: Ask) -> bytes:
    """Begin a stream: a message without content."""
    return _event(
        {
            "type": "message_start",
            "message": {**_envelope(ask), "stop_reason": None, "stop_sequence": None, "usage": usage(ask, 0)},
        }
    )


def step(ask: Ask, number: int) -> bytes:
    """Give one token, and open and close its block where it is the first or the last of it."""
    index = 1 if ask.reasoning_steps and number >= ask.reasoning_steps else 0
    token = ask.choices[0][number]
    events = []
    if number in (0, ask.reasoning_steps):
        events.append({"type": "content_block_start", "content_block": _empty_block(ask, number), "index": index})
    events.append({"type": "content_block_delta", "delta": _delta(ask, number, token), "index": index})
    if number + 1 in (ask.reasoning_steps, ask.steps):
        events += _closing(ask, number, index)
    return b"".join(map(_event, events))


def ending(ask: Ask) -> bytes:
    """End a stream: why, and with how many tokens."""
    delta = {"stop_reason": STOP_REASONS[ask.finish_reason], "stop_sequence": None}
    events: list[dict[str, Any]] = [
        {"type": "message_delta", "delta": delta, "usage": usage(ask, ask.steps)},
        {"type": "message_stop"},
    ]
    return b"".join(map(_event, events))


def failed(message: str) -> bytes:
    """Say that the rest won't come; nothing follows."""
    return _event({"type": "error", "error": {"type": "internal_error", "message": message}})


def whole(ask: Ask) -> dict[str, Any]:
    """Answer at once; vLLM leaves out what is null."""
    return {
        **_envelope(ask, content=list(_blocks(ask))),
        "stop_reason": STOP_REASONS[ask.finish_reason],
        "usage": usage(ask, ask.steps),
    }


def error(body: dict[str, Any]) -> dict[str, Any]:
    """Translate an error, unless it is one that vLLM finds before it looks at the dialect."""
    error = body["error"]
    if error["type"] == "Bad Request":
        return body
    return {"type": "error", "error": {"type": error["type"], "message": error["message"]}}


def usage(ask: Ask, steps: int) -> dict[str, Any]:
    """Count tokens so far."""
    counted = answers.usage(ask, steps)
    return {"input_tokens": counted["prompt_tokens"], "output_tokens": counted["completion_tokens"]}


def _envelope(ask: Ask, content: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    return {"id": ask.id, "type": "message", "role": "assistant", "content": content or [], "model": ask.model}


def _empty_block(ask: Ask, number: int) -> dict[str, Any]:
    if ask.tool:
        return {"type": "tool_use", "id": answers.call_id(ask), "name": ask.tool, "input": {}}
    kind = "thinking" if number < ask.reasoning_steps else "text"
    return {"type": kind, kind: ""}


def _delta(ask: Ask, number: int, token: str) -> dict[str, Any]:
    if ask.tool:
        return {"type": "input_json_delta", "partial_json": token}
    kind = "thinking" if number < ask.reasoning_steps else "text"
    return {"type": f"{kind}_delta", kind: token}


def _closing(ask: Ask, number: int, index: int) -> Iterator[dict[str, Any]]:
    if number < ask.reasoning_steps:
        signed = {"type": "signature_delta", "signature": uuid.uuid4().hex}
        yield {"type": "content_block_delta", "delta": signed, "index": index}
    yield {"type": "content_block_stop", "index": index}


def _blocks(ask: Ask) -> Iterator[dict[str, Any]]:
    tokens = ask.choices[0]
    if ask.tool:
        yield {"type": "tool_use", "id": answers.call_id(ask), "name": ask.tool, "input": json.loads("".join(tokens))}
        return
    if ask.reasoning_steps:
        thought = "".join(tokens[: ask.reasoning_steps])
        yield {"type": "thinking", "thinking": thought, "signature": uuid.uuid4().hex}
    yield {"type": "text", "text": "".join(tokens[ask.reasoning_steps :])}


def _event(body: dict[str, Any]) -> bytes:
    return f"event: {body['type']}\ndata: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()
