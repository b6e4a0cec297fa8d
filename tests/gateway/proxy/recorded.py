"""Streams that vLLM sent, from `tests/fakes/recorded/`, and what a client must get for them."""

import json
import re
from pathlib import Path

from tests.fakes.running import ROOT

RECORDED = ROOT / "tests" / "fakes" / "recorded"
CHATS = ("text", "reasoning", "tools", "logprobs", "choices")
MESSAGES = ("messages-text", "messages-reasoning", "messages-tools")
RESPONSES = ("responses-text",)

# The unary answer that belongs to the recorded streams; the model's name in its text must not be replaced.
WHOLE = (
    '{"id":"chatcmpl-9f3c","object":"chat.completion","created":1795000000,"model":"m1","choices":[{"index":0,'
    '"message":{"role":"assistant","content":"Der Bär \\"model\\":\\"m1\\" 👩‍👩‍👧\\n",'
    '"refusal":null,"annotations":null,"audio":null,"function_call":null,"reasoning":null},'
    '"logprobs":null,"finish_reason":"stop","stop_reason":null,"token_ids":null}],'
    '"service_tier":null,"system_fingerprint":null,"usage":{"prompt_tokens":31,"total_tokens":39,"completion_tokens":8,'
    '"prompt_tokens_details":null},"prompt_logprobs":null,"kv_transfer_params":null}'
).encode()

_MIRRORED = re.compile(rb'("reasoning":"(?:[^"\\]|\\.)*"),"reasoning_content":"(?:[^"\\]|\\.)*"')


def recorded(name: str) -> bytes:
    """A stream in vLLM's own bytes."""
    return Path(RECORDED / f"{name}.sse").read_bytes()


def expected(body: bytes, asked: str = "smol", *, usage: bool = True) -> bytes:
    """What a client gets: its own name for the model, and the usage of a chat only if it asked for it."""
    kept = [event for event in events(body) if usage or b'"choices":[],"usage":' not in event]
    return b"".join(_renamed(event, asked) for event in kept)


def unmirrored(body: bytes) -> bytes:
    """Drop the copies of `reasoning` under its other name."""
    return _MIRRORED.sub(rb"\1", body)


def events(body: bytes) -> list[bytes]:
    """Split a stream into events, each with its blank line."""
    return [event + b"\n\n" for event in body.split(b"\n\n")[:-1]]


def _renamed(event: bytes, asked: str) -> bytes:
    """Replace the name in an object's own field, and not in texts of clients or models."""
    data = event.rpartition(b"data: ")[2]
    if data == b"[DONE]\n\n":
        return event
    fields = json.loads(data)
    holder = fields.get("message") or fields.get("response") or fields
    if "model" not in holder:
        return event
    # In all recorded objects it follows another field, and a text cannot contain it unescaped.
    before = b'"metadata":{"model":"m1"},' if b'"metadata":{"model":"m1"},' in event else b""
    name = json.dumps(asked).encode()
    return event.replace(before + b'"model":"m1"', before + b'"model":' + name, 1)
