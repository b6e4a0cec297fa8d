"""What vLLM sends, from `tests/fakes/recorded/`, and what a client must get for it."""

import json
import re
from pathlib import Path

from tests.fakes.running import ROOT

RECORDED = ROOT / "tests" / "fakes" / "recorded"
CHATS = ("text", "reasoning", "tools", "logprobs", "choices")
MESSAGES = ("messages-text", "messages-reasoning", "messages-tools")
RESPONSES = ("responses-text",)

# The whole answer that belongs to the recorded streams, with a name in the text that must stay.
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
    """What a client gets: its own name for the model, and usage in a chat only if it asked for it."""
    passed = [event for event in events(body) if usage or b'"choices":[],"usage":' not in event]
    return b"".join(_renamed(event, asked) for event in passed)


def unmirrored(body: bytes) -> bytes:
    """Without the copies of `reasoning` under its other name."""
    return _MIRRORED.sub(rb"\1", body)


def events(body: bytes) -> list[bytes]:
    """Whole events, each with its blank line."""
    return [event + b"\n\n" for event in body.split(b"\n\n")[:-1]]


def _renamed(event: bytes, asked: str) -> bytes:
    """Only the name that stands in an object's own field changes, not what clients or models say."""
    data = event.rpartition(b"data: ")[2]
    if data == b"[DONE]\n\n":
        return event
    fields = json.loads(data)
    holder = fields.get("message") or fields.get("response") or fields
    if "model" not in holder:
        return event
    # In all recorded objects it follows another field, and text can't hold it unescaped.
    before = b'"metadata":{"model":"m1"},' if b'"metadata":{"model":"m1"},' in event else b""
    name = json.dumps(asked).encode()
    return event.replace(before + b'"model":"m1"', before + b'"model":' + name, 1)
