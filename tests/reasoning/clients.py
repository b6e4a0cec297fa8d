"""What a client reads out of an answer, whole or streamed, after the gateway has shaped it."""

from dataclasses import dataclass
from functools import partial

import msgspec

from gateway.openai.endpoints import CHAT
from gateway.openai.reasoning import ReasoningFormat, ReasoningRewriter, rewrite_reasoning
from gateway.openai.response import parse_response, rewrite_response
from gateway.openai.sse import EventSplitter
from gateway.openai.stream import ChunkFilter


@dataclass(frozen=True, slots=True)
class Read:
    """The texts of one choice; None is: the field was never there, or null."""

    reasoning: str | None = None
    content: str | None = None
    mirrored: str | None = None


def read_whole(answer: bytes, reasoning_format: ReasoningFormat) -> list[Read]:
    """Read a whole answer."""
    body, _ = rewrite_response(
        parse_response(answer), "alias", partial(rewrite_reasoning, reasoning_format=reasoning_format)
    )
    told = msgspec.json.decode(body)
    assert told["model"] == "alias"
    if reasoning_format.hides_token_ids:
        assert [told["prompt_token_ids"], *(choice["token_ids"] for choice in told["choices"])] == [None] * (
            1 + len(told["choices"])
        )
    messages = [choice["message"] for choice in told["choices"]]
    return [Read(each["reasoning"], each["content"], each.get("reasoning_content")) for each in messages]


def apply(stream: bytes, reasoning_format: ReasoningFormat) -> bytes:
    """What a client gets of a stream."""
    transcript, shaping = ChunkFilter(CHAT, "alias", wants_usage=False), ReasoningRewriter(reasoning_format)
    return b"".join(transcript.apply(shaping.apply(event)) for event in EventSplitter().feed(stream))


def read_stream(stream: bytes, reasoning_format: ReasoningFormat) -> list[Read]:
    """Read a stream to its end."""
    choices: dict[int, Read] = {}
    for event in EventSplitter().feed(apply(stream, reasoning_format)):
        if not event.startswith(b"data: {"):
            continue
        for choice in msgspec.json.decode(event[6:])["choices"]:
            assert not (reasoning_format.hides_token_ids and choice.get("token_ids"))
            read, delta = choices.get(choice["index"], Read()), choice["delta"]
            choices[choice["index"]] = Read(
                _longer(read.reasoning, delta.get("reasoning")),
                _longer(read.content, delta.get("content")),
                _longer(read.mirrored, delta.get("reasoning_content")),
            )
    return [choices[index] for index in sorted(choices)]


def _longer(text: str | None, more: str | None) -> str | None:
    """An empty piece, as in a chat's opening, says nothing."""
    return (text or "") + more if more else text
