"""The three shapes of reasoning: a field of its own, put back into the content, or as the model generated it.

Replicas run with vLLM's reasoning parser, which drops the tags and not one blank beside them, so the other shapes can
be made from what it tells. What it can't tell:

- A thought that never closes may be the answer itself: a model that skips thinking. Where the model writes the tag, the
  first token says which it is, and replicas are asked for token ids. Where the template injects it, only the end does
  (it ended by itself, without an answer): a whole answer is told as content, in a stream the text that went out as
  reasoning is repeated as content.
- An empty thought leaves no trace, nor does a tag that the model repeats, nor the end of a thought behind which nothing
  comes: `raw` lacks these. It ends a thought that a tool call ended with a tag that nobody wrote.
"""

import re
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from gateway.errors import NO_JSON
from gateway.openai.sse import event_data
from serving.replica import ThinkTag

Shape = Literal["parsed", "restored", "raw"]
Fields = dict[str, msgspec.Raw]

OPEN, CLOSE = "<think>", "</think>"
# How it is called by vLLM, and by vLLM before 0.12 and other engines.
REASONING = ("reasoning", "reasoning_content")
# Blanks may come before the tag; one that stands further back is spoken of.
LEADING_TOKENS = 4
_NULL = msgspec.Raw(b"null")
_NOTHING = {"delta": b"{}", "logprobs": b"null", "finish_reason": b"null"}

_ENCODER = msgspec.json.Encoder()
_FIELDS = msgspec.json.Decoder(Fields)
_CHOICES = msgspec.json.Decoder(list[Fields])

# A delta with reasoning and nothing else in it, as vLLM writes it for every token of a thought.
_ONLY_REASONING = re.compile(
    rb'"index":(?P<index>\d+),"delta":\{(?P<key>"reasoning"):"(?P<text>(?:[^"\\]|\\.)*)"(?P<end>\}),'
    rb'"logprobs":null,"finish_reason":null'
)
_THOUGHT = re.compile(rb'"reasoning(?:_content)?"\s*:\s*(?!null)')
_TOKEN_IDS = re.compile(rb'"((?:prompt_)?token_ids)":\[[\d,\s]*\]')


class ReasoningFormat(msgspec.Struct, frozen=True):
    """How the answers of one request are told: the shape, and who writes the opening tag.

    `think_token` is that tag where the answer comes with token ids and the model writes it. `hides_ids`: the ids were
    asked for on our account, so the client doesn't see them.
    """

    shape: Shape = "parsed"
    think: ThinkTag | None = None
    think_token: int | None = None
    hides_token_ids: bool = False


@dataclass(frozen=True, slots=True)
class Delta:
    """What one event, or a whole answer, says in one choice; None is: nothing was said."""

    reasoning: str | None = None
    content: str | None = None
    token_ids: tuple[int, ...] = ()
    calls_tool: bool = False
    ended: bool = False  # by itself: not cut off by a limit, a stop word or a tool


@dataclass(slots=True)
class ThinkState:
    """Follows one choice from the first token on, and says what the client gets.

    ===========  ======================================================
    phase        what is known
    ===========  ======================================================
    undecided    nothing but blanks so far
    thinking     a thought has begun and isn't closed
    skipped      the model didn't think: what is called reasoning is the answer
    answering    there was content, or a tool call
    ===========  ======================================================
    """

    manner: ReasoningFormat
    phase: Literal["undecided", "thinking", "skipped", "answering"] = "undecided"
    sure: bool = False
    _opened: bool = False  # something of the thought went out
    _blanks: str = ""
    _thought: list[bytes] = field(default_factory=list)  # as it stands in JSON

    def told(self, said: Delta) -> Delta:
        """Turn what the parser says into what the client gets."""
        reasoning = said.reasoning or ""
        if self.phase == "undecided":
            reasoning = self._blanks + reasoning
            self._decide(said, reasoning)
            if self.phase == "undecided":
                self._blanks = reasoning
                return Delta(content=said.content, ended=said.ended)
        if self.phase == "thinking":
            return self._thinking(said, reasoning)
        if self.phase == "skipped" or self.manner.shape != "parsed":
            return Delta(content=_joined(reasoning, said.content))
        return Delta(reasoning or None, said.content)

    @property
    def steady(self) -> bool:
        """Tell whether more reasoning changes nothing, so that it can be passed on as bytes."""
        return self.phase == "skipped" or (self.phase == "thinking" and self._opened)

    def goes_on(self, piece: bytes) -> None:
        """Keep a piece of a thought, as it stands in JSON, as long as it may turn out to be the answer."""
        if self._may_be_answer:
            self._thought.append(piece)

    @property
    def becomes_content(self) -> bool:
        """Tell whether what is called reasoning belongs into the content."""
        return self.manner.shape != "parsed" or self.phase == "skipped"

    @property
    def _may_be_answer(self) -> bool:
        return not self.sure and self.phase == "thinking" and self.manner.shape != "raw"

    def _decide(self, said: Delta, reasoning: str) -> None:
        token = self.manner.think_token
        if token is not None and token in said.token_ids[:LEADING_TOKENS]:
            self.phase, self.sure = "thinking", True
        elif reasoning.strip() or (reasoning and (token is None or said.content)):
            # Content behind it: the parser has seen the end of a thought, whoever began it.
            self.phase = "thinking" if token is None or said.content or said.calls_tool else "skipped"
        elif said.content or said.calls_tool:
            self.phase = "answering"

    def _thinking(self, said: Delta, reasoning: str) -> Delta:
        self.goes_on(_ENCODER.encode(reasoning)[1:-1])
        answers = bool(said.content) or said.calls_tool
        content = said.content
        if said.ended and not answers and self._may_be_answer:
            return self._is_answer(reasoning)
        # The tag's own token has no text: what the thought begins with is known later.
        begins = not self._opened and bool(reasoning or answers or said.ended)
        self._opened |= begins
        if answers:
            self.phase = "answering"
            self._thought.clear()
        if self.manner.shape == "parsed":
            return Delta(reasoning or None, content)
        opening = self._opening(reasoning) if begins else ""
        return Delta(content=_joined(opening + reasoning + (CLOSE if answers else ""), content))

    def _is_answer(self, reasoning: str) -> Delta:
        """The thought ended by itself, unclosed and without an answer: it was one."""
        answer: str = msgspec.json.decode(b'"%b"' % b"".join(self._thought))
        self._thought.clear()
        self.phase = "answering"
        if not self._opened:
            return Delta(content=answer)
        if self.manner.shape == "parsed":
            return Delta(reasoning or None, answer)
        return Delta(content=f"{reasoning}{CLOSE}\n\n{answer}")

    def _opening(self, reasoning: str) -> str:
        if self.manner.shape == "raw":
            return OPEN if self.manner.think == "model" else ""
        return OPEN if reasoning.startswith("\n") else f"{OPEN}\n"


@dataclass(slots=True)
class ReasoningRewriter:
    """Shapes a chat stream, event by event; once all choices are at their answers, events aren't looked into."""

    manner: ReasoningFormat
    _thoughts: dict[int, ThinkState] = field(default_factory=dict)
    _thinking: bool = True

    def apply(self, event: bytes) -> bytes:
        """Say what the client gets for an event; b"" for nothing."""
        if self._thinking or b'"reasoning"' in event or b'"reasoning_content"' in event:
            only = _ONLY_REASONING.search(event)
            thought = self._thoughts.get(int(only["index"])) if only else None
            event = _steady(event, only, thought) if only and thought and thought.steady else self._read(event)
        return _TOKEN_IDS.sub(rb'"\1":null', event) if self.manner.hides_token_ids else event

    def _read(self, event: bytes) -> bytes:
        data = event_data(event)
        if not data.startswith(b"{"):
            return event
        try:
            chunk = _FIELDS.decode(data)
            before = _CHOICES.decode(chunk.get("choices", b"[]"))
            after = [self._choice(choice) for choice in before]
        except NO_JSON:
            # For the client to judge.
            return event
        self._thinking = not self._thoughts or any(
            each.phase in {"undecided", "thinking"} for each in self._thoughts.values()
        )
        if self.manner.hides_token_ids and after and all(_says_nothing(choice) for choice in after):
            # It is here for its token id alone.
            return b""
        if after == before:
            return event
        chunk["choices"] = msgspec.Raw(_ENCODER.encode(after))
        return b"data: %b\n\n" % _ENCODER.encode(chunk)

    def _choice(self, choice: Fields) -> Fields:
        index = msgspec.json.decode(choice.get("index", b"0"), type=int)
        thought = self._thoughts.setdefault(index, ThinkState(self.manner))
        return _retold(choice, "delta", thought)


def has_reasoning(answer: bytes, manner: ReasoningFormat) -> bool:
    """Say whether there is anything to shape in a whole answer: a thought, or token ids that stay here."""
    return manner.hides_token_ids or _THOUGHT.search(answer) is not None


def rewrite_reasoning(answer: Fields, manner: ReasoningFormat) -> Fields:
    """Shape a whole answer, given as its top level."""
    try:
        choices = [
            _retold(each, "message", ThinkState(manner)) for each in _CHOICES.decode(answer.get("choices", b"[]"))
        ]
    except NO_JSON:
        return answer
    if not manner.hides_token_ids:
        return {**answer, "choices": msgspec.Raw(_ENCODER.encode(choices))} if choices else answer
    shown = [{**choice, "token_ids": _NULL} for choice in choices]
    return {**answer, "choices": msgspec.Raw(_ENCODER.encode(shown)), "prompt_token_ids": _NULL}


def _steady(event: bytes, only: re.Match[bytes], thought: ThinkState) -> bytes:
    """Pass on one more piece of a thought without parsing it."""
    thought.goes_on(only["text"])
    if thought.becomes_content:
        return event[: only.start("key")] + b'"content"' + event[only.end("key") :]
    mirrored = b',"reasoning_content":"%b"' % only["text"]
    return event[: only.start("end")] + mirrored + event[only.start("end") :]


def _retold(choice: Fields, part: Literal["delta", "message"], thought: ThinkState) -> Fields:
    body = _FIELDS.decode(choice.get(part, b"{}"))
    said = _said(choice, body)
    told = thought.told(said)
    if not said.reasoning and told.content == said.content:
        return choice
    whole = part == "message"
    fields = {key: value for key, value in body.items() if key not in REASONING}
    if told.content is not None or whole:
        fields["content"] = _raw(told.content)
    if told.reasoning is not None or whole:
        fields["reasoning"] = _raw(told.reasoning)
    if told.reasoning is not None:
        fields["reasoning_content"] = _raw(told.reasoning)
    return {**choice, part: _raw(fields)}


def _said(choice: Fields, body: Fields) -> Delta:
    reasoning = next((text for key in REASONING if (text := _value(body, key, str)) is not None), None)
    # A stop word cut it off; a number is the token that the model ends with.
    cut = isinstance(_value(choice, "stop_reason", str | int), str)
    return Delta(
        reasoning=reasoning,
        content=_value(body, "content", str),
        token_ids=_value(choice, "token_ids", tuple[int, ...]) or (),
        calls_tool=bool(_value(body, "tool_calls", list[msgspec.Raw])),
        ended=_value(choice, "finish_reason", str) == "stop" and not cut,
    )


def _says_nothing(choice: Fields) -> bool:
    return all(bytes(choice.get(key, b"null")) == nothing for key, nothing in _NOTHING.items())


def _value(fields: Fields, key: str, kind: Any) -> Any:
    return msgspec.json.decode(fields.get(key, b"null"), type=kind | None)


def _raw(value: Any) -> msgspec.Raw:
    return msgspec.Raw(_ENCODER.encode(value))


def _joined(before: str, after: str | None) -> str | None:
    """Two texts as one; nothing stays nothing, and not an empty text."""
    return (before + (after or "")) if before else after
