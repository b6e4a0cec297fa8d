"""What a client reads out of an answer, whole or streamed, after the gateway has shaped it."""

from dataclasses import dataclass
from functools import partial

import msgspec

from gateway.api.endpoints import CHAT
from gateway.api.sse import EventCutter
from gateway.relay.replies import fields_of, renamed
from gateway.relay.shapes import Manner, Shaping, shaped
from gateway.relay.streams import Chunks


@dataclass(frozen=True, slots=True)
class Read:
    """The texts of one choice; None is: the field was never there, or null."""

    reasoning: str | None = None
    content: str | None = None
    mirrored: str | None = None


def read_whole(answer: bytes, manner: Manner) -> list[Read]:
    """Read a whole answer."""
    body, _ = renamed(fields_of(answer), "alias", partial(shaped, manner=manner))
    told = msgspec.json.decode(body)
    assert told["model"] == "alias"
    if manner.hides_ids:
        assert [told["prompt_token_ids"], *(choice["token_ids"] for choice in told["choices"])] == [None] * (
            1 + len(told["choices"])
        )
    messages = [choice["message"] for choice in told["choices"]]
    return [Read(each["reasoning"], each["content"], each.get("reasoning_content")) for each in messages]


def passed_on(stream: bytes, manner: Manner) -> bytes:
    """What a client gets of a stream."""
    transcript, shaping = Chunks(CHAT, "alias", wants_usage=False), Shaping(manner)
    return b"".join(transcript.passed_on(shaping.passed_on(event)) for event in EventCutter().feed(stream))


def read_stream(stream: bytes, manner: Manner) -> list[Read]:
    """Read a stream to its end."""
    choices: dict[int, Read] = {}
    for event in EventCutter().feed(passed_on(stream, manner)):
        if not event.startswith(b"data: {"):
            continue
        for choice in msgspec.json.decode(event[6:])["choices"]:
            assert not (manner.hides_ids and choice.get("token_ids"))
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
