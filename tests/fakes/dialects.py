"""One generation in each of the four dialects: what a stream says when, and what a whole answer is."""

import json
from dataclasses import dataclass
from typing import Any, Protocol

from tests.fakes import answers, messages, responses
from tests.fakes.asks import Ask

DONE = b"data: [DONE]\n\n"


class Dialect(Protocol):
    """What an answer consists of."""

    def greeting(self) -> bytes:
        """Give what a stream says before the first token is there."""
        ...

    def step(self, number: int) -> bytes:
        """Give the events of one step."""
        ...

    def ending(self) -> bytes:
        """Give what follows the last step."""
        ...

    def failed(self, error: dict[str, Any]) -> bytes | None:
        """Tell of a failure in the middle of a stream; None: vLLM itself breaks off here."""
        ...

    def whole(self) -> dict[str, Any]:
        """Give the answer to who didn't ask for a stream."""
        ...


@dataclass(frozen=True, slots=True)
class OpenAI:
    """Chat, and the older completions."""

    ask: Ask

    def greeting(self) -> bytes:
        return b""

    def step(self, number: int) -> bytes:
        opening = answers.role_chunks(self.ask) if number == 0 else []
        return b"".join(map(event, [*opening, *answers.step_chunks(self.ask, number)]))

    def ending(self) -> bytes:
        return (event(answers.usage_chunk(self.ask)) if self.ask.include_usage else b"") + DONE

    def failed(self, error: dict[str, Any]) -> bytes | None:
        return event(error) + DONE

    def whole(self) -> dict[str, Any]:
        return answers.whole(self.ask)


@dataclass(frozen=True, slots=True)
class Anthropic:
    """Messages."""

    ask: Ask

    def greeting(self) -> bytes:
        return b""

    def step(self, number: int) -> bytes:
        return (messages.opening(self.ask) if number == 0 else b"") + messages.step(self.ask, number)

    def ending(self) -> bytes:
        return messages.ending(self.ask)

    def failed(self, error: dict[str, Any]) -> bytes | None:
        return messages.failed(error["error"]["message"])

    def whole(self) -> dict[str, Any]:
        return messages.whole(self.ask)


@dataclass(frozen=True, slots=True)
class Responses:
    """Responses; vLLM 0.32 has no way of telling that one went wrong in the middle."""

    stream: responses.ResponseStream

    def greeting(self) -> bytes:
        return self.stream.greeting()

    def step(self, number: int) -> bytes:
        return self.stream.step(number)

    def ending(self) -> bytes:
        return self.stream.ending()

    def failed(self, error: dict[str, Any]) -> bytes | None:
        return None

    def whole(self) -> dict[str, Any]:
        return responses.whole(self.stream.ask)


def dialect_of(ask: Ask) -> Dialect:
    """Choose by what was asked."""
    if ask.kind == "messages":
        return Anthropic(ask)
    return Responses(responses.ResponseStream(ask)) if ask.kind == "responses" else OpenAI(ask)


def event(body: Any) -> bytes:
    """Write an event without a name, as compact as vLLM's."""
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
