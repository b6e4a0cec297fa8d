"""What an answer shows about its variant: empty, endless, with an open <think> or invalid calls of tools. Pure.

It reads what the client was sent: chat completions and completions, whole or streamed. Of other endpoints only what
statistics know is judged.
"""

from dataclasses import dataclass

import msgspec

from gateway.errors import INVALID_JSON

# A loop is a piece of at most so many characters, at least so often in a row at the end of a text.
MAX_PERIOD, MIN_REPEATS, MIN_LOOP = 200, 6, 120
DATA = b"data: "


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class _Call(msgspec.Struct):
    index: int = 0
    function: _Function | None = None


class _ContentPart(msgspec.Struct):
    """A message, or a delta of one."""

    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[_Call] | None = None


class _AnswerChoice(msgspec.Struct):
    index: int = 0
    delta: _ContentPart | None = None
    message: _ContentPart | None = None
    text: str | None = None


class _Answer(msgspec.Struct):
    choices: list[_AnswerChoice] = []


_DECODER = msgspec.json.Decoder(_Answer)


@dataclass(frozen=True, slots=True)
class Content:
    """The first choice of an answer; `calls` are the arguments of its calls of tools."""

    text: str = ""
    reasoning: str = ""
    calls: tuple[str, ...] = ()

    @property
    def events(self) -> frozenset[str]:
        """What counts as an event of its conversation."""
        found = {
            "open_thinking": self.has_open_thinking,
            "invalid_tool_call": not all(map(_is_json, self.calls)),
            "empty_or_looping": self.is_empty or is_looping(self.text) or is_looping(self.reasoning),
        }
        return frozenset(name for name, happened in found.items() if happened)

    @property
    def has_open_thinking(self) -> bool:
        """Whether it ends before the model has stopped to think."""
        if self.reasoning:
            return not self.text.strip() and not self.calls
        return "<think>" in self.text and "</think>" not in self.text

    @property
    def is_empty(self) -> bool:
        """Whether it has neither text nor thoughts nor calls."""
        return not self.text.strip() and not self.reasoning.strip() and not self.calls


def read_content(body: bytes) -> Content | None:
    """Read an answer or a stream of events; None if it has no choices in this form."""
    texts, thoughts = [], []
    calls: dict[int, str] = {}
    seen = False
    for answer in _answers(body):
        for choice in answer.choices:
            if choice.index:
                continue
            seen = True
            texts.append(choice.text or "")
            part = choice.delta or choice.message
            if part is None:
                continue
            texts.append(part.content or "")
            thoughts.append(part.reasoning or part.reasoning_content or "")
            for place, call in enumerate(part.tool_calls or ()):
                index = call.index or (place if choice.message else call.index)
                calls[index] = calls.get(index, "") + ((call.function and call.function.arguments) or "")
    return Content("".join(texts), "".join(thoughts), tuple(calls.values())) if seen else None


def is_looping(text: str) -> bool:
    """Whether a text ends in one piece that is repeated again and again."""
    tail = text[-MAX_PERIOD * MIN_REPEATS :]
    size = len(tail)
    if size < MIN_LOOP:
        return False
    for period in range(1, min(MAX_PERIOD, size // MIN_REPEATS) + 1):
        length = max(period * MIN_REPEATS, MIN_LOOP)
        if length <= size and tail[-period - 1 : -period] == tail[-1:]:
            end = tail[-length:]
            if end[period:] == end[:-period]:
                return True
    return False


def _answers(body: bytes) -> list[_Answer]:
    pieces = (
        [body]
        if body.lstrip()[:1] == b"{"
        else [
            line[len(DATA) :]
            for line in body.split(b"\n")
            if line.startswith(DATA) and not line.startswith(b"data: [DONE]")
        ]
    )
    answers = []
    for piece in pieces:
        try:
            answers.append(_DECODER.decode(piece))
        except INVALID_JSON:
            continue
    return answers


def _is_json(arguments: str) -> bool:
    try:
        return isinstance(msgspec.json.decode(arguments or "{}"), dict)
    except INVALID_JSON:
        return False
