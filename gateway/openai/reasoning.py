"""Rewrites reasoning into the form that an alias asks for: a separate field, <think> tags in content, or raw output.

Replicas run with vLLM's reasoning parser. It removes the tags but keeps all whitespace around them, so the other forms
can be rebuilt from its output, with these limits:

- A thought that never closes can be the answer itself: the model skipped thinking. Where the model writes the opening
  tag, the first token decides, and the gateway requests token ids. Where the chat template injects the tag, only the
  end decides: generation stopped by itself, without an answer. A whole response then has the text as content; in a
  stream, the text already sent as reasoning is repeated as content.
- An empty thought leaves no trace, nor does a repeated tag, nor the end of a thought that nothing follows: `raw` lacks
  these. It also closes a thought that a tool call ended with a tag that the model did not write.
"""

import re
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from gateway.errors import INVALID_JSON
from gateway.openai.sse import event_data
from serving.replica import ThinkTag

Shape = Literal["parsed", "restored", "raw"]
Fields = dict[str, msgspec.Raw]

OPEN, CLOSE = "<think>", "</think>"
# vLLM's field, and its name before vLLM 0.12 and in other engines.
REASONING_KEYS = ("reasoning", "reasoning_content")
# Only whitespace may precede the opening tag. A tag further back is text about the tag.
LEADING_TOKENS = 4
_NULL = msgspec.Raw(b"null")
_EMPTY_CHOICE = {"delta": b"{}", "logprobs": b"null", "finish_reason": b"null"}

_ENCODER = msgspec.json.Encoder()
_FIELDS = msgspec.json.Decoder(Fields)
_CHOICES = msgspec.json.Decoder(list[Fields])

# A choice whose delta is one piece of reasoning and nothing else, as vLLM writes it for every token of a thought.
_REASONING_DELTA = re.compile(
    rb'"index":(?P<index>\d+),"delta":\{(?P<key>"reasoning"):"(?P<text>(?:[^"\\]|\\.)*)"(?P<end>\}),'
    rb'"logprobs":null,"finish_reason":null'
)
_NON_NULL_REASONING = re.compile(rb'"reasoning(?:_content)?"\s*:\s*(?!null)')
_TOKEN_IDS = re.compile(rb'"((?:prompt_)?token_ids)":\[[\d,\s]*\]')


class ReasoningFormat(msgspec.Struct, frozen=True):
    """How reasoning is returned for one request.

    `shape` is the form for the client. `think` says who writes the opening tag, the template or the model.
    `think_token` is the tag's token id, if the model writes it and the replica returns token ids. `hides_token_ids`:
    the gateway requested the token ids, so they are removed from the response.
    """

    shape: Shape = "parsed"
    think: ThinkTag | None = None
    think_token: int | None = None
    hides_token_ids: bool = False


@dataclass(frozen=True, slots=True)
class Delta:
    """The relevant parts of one choice, in an event or a whole response; None: the field is absent or null."""

    reasoning: str | None = None
    content: str | None = None
    token_ids: tuple[int, ...] = ()
    calls_tool: bool = False
    ended: bool = False  # by an end token: not by a length limit, a stop word or a tool call


@dataclass(slots=True)
class ThinkState:
    """State machine of one choice: classifies the parser's output and rewrites it for the client.

    ===========  ====================================  ===========================================================
    phase        meaning                               next phase
    ===========  ====================================  ===========================================================
    undecided    nothing but whitespace so far         thinking: the opening tag's token, or reasoning;
                                                       skipped: reasoning alone, without the tag's token, where the
                                                       model writes the tag; answering: content or a tool call
    thinking     in a thought that is not closed       answering: content or a tool call, or generation stops by
                                                       itself (then the thought was the answer)
    skipped      the model did not think: the          none
                 parser's reasoning is the answer
    answering    there was content, or a tool call     none
    ===========  ====================================  ===========================================================

    `confirmed`: the opening tag's token was seen, so the thought cannot be the answer.
    """

    reasoning_format: ReasoningFormat
    phase: Literal["undecided", "thinking", "skipped", "answering"] = "undecided"
    confirmed: bool = False
    _sent: bool = False  # some of the thought went to the client
    _whitespace: str = ""  # withheld while undecided
    _thought: list[bytes] = field(default_factory=list)  # JSON-escaped pieces, in case the thought is the answer

    def apply(self, delta: Delta) -> Delta:
        """Rewrite the parser's output for the client."""
        reasoning = delta.reasoning or ""
        if self.phase == "undecided":
            reasoning = self._whitespace + reasoning
            self._decide(delta, reasoning)
            if self.phase == "undecided":
                self._whitespace = reasoning
                return Delta(content=delta.content, ended=delta.ended)
        if self.phase == "thinking":
            return self._apply_thinking(delta, reasoning)
        if self.phase == "skipped" or self.reasoning_format.shape != "parsed":
            return Delta(content=_concat(reasoning, delta.content))
        return Delta(reasoning or None, delta.content)

    @property
    def passes_through(self) -> bool:
        """Whether more reasoning cannot change the phase: its bytes need no decoding."""
        return self.phase == "skipped" or (self.phase == "thinking" and self._sent)

    def append(self, text: bytes) -> None:
        """Keep a JSON-escaped piece of a thought for as long as the thought may be the answer."""
        if self._may_be_answer:
            self._thought.append(text)

    @property
    def becomes_content(self) -> bool:
        """Whether the parser's reasoning goes into the client's content."""
        return self.reasoning_format.shape != "parsed" or self.phase == "skipped"

    @property
    def _may_be_answer(self) -> bool:
        return not self.confirmed and self.phase == "thinking" and self.reasoning_format.shape != "raw"

    def _decide(self, delta: Delta, reasoning: str) -> None:
        token = self.reasoning_format.think_token
        if token is not None and token in delta.token_ids[:LEADING_TOKENS]:
            self.phase, self.confirmed = "thinking", True
        elif reasoning.strip() or (reasoning and (token is None or delta.content)):
            # Content or a tool call after it: the parser has seen the end of a thought.
            self.phase = "thinking" if token is None or delta.content or delta.calls_tool else "skipped"
        elif delta.content or delta.calls_tool:
            self.phase = "answering"

    def _apply_thinking(self, delta: Delta, reasoning: str) -> Delta:
        self.append(_ENCODER.encode(reasoning)[1:-1])
        answers = bool(delta.content) or delta.calls_tool
        content = delta.content
        if delta.ended and not answers and self._may_be_answer:
            return self._as_answer(reasoning)
        # The opening tag's token has no text. The tag is written with the first text: it depends on its whitespace.
        starts = not self._sent and bool(reasoning or answers or delta.ended)
        self._sent |= starts
        if answers:
            self.phase = "answering"
            self._thought.clear()
        if self.reasoning_format.shape == "parsed":
            return Delta(reasoning or None, content)
        tag = self._opening_tag(reasoning) if starts else ""
        return Delta(content=_concat(tag + reasoning + (CLOSE if answers else ""), content))

    def _as_answer(self, reasoning: str) -> Delta:
        """Return the whole thought as content: it ended by itself, unclosed and without an answer."""
        answer: str = msgspec.json.decode(b'"%b"' % b"".join(self._thought))
        self._thought.clear()
        self.phase = "answering"
        if not self._sent:
            return Delta(content=answer)
        if self.reasoning_format.shape == "parsed":
            return Delta(reasoning or None, answer)
        return Delta(content=f"{reasoning}{CLOSE}\n\n{answer}")

    def _opening_tag(self, reasoning: str) -> str:
        if self.reasoning_format.shape == "raw":
            return OPEN if self.reasoning_format.think == "model" else ""
        return OPEN if reasoning.startswith("\n") else f"{OPEN}\n"


@dataclass(slots=True)
class ReasoningRewriter:
    """Rewrites a chat stream event by event. Once all choices are at their answers, events are not decoded any more."""

    reasoning_format: ReasoningFormat
    _states: dict[int, ThinkState] = field(default_factory=dict)  # by index of the choice
    _thinking: bool = True  # some choice is undecided or thinking

    def apply(self, event: bytes) -> bytes:
        """Return what the client gets for an event; b"" for nothing."""
        if self._thinking or b'"reasoning' in event:
            match = _REASONING_DELTA.search(event)
            state = self._states.get(int(match["index"])) if match else None
            if match and state and state.passes_through:
                event = _pass_through(event, match, state)
            else:
                event = self._decode_and_rewrite(event)
        return _TOKEN_IDS.sub(rb'"\1":null', event) if self.reasoning_format.hides_token_ids else event

    def _decode_and_rewrite(self, event: bytes) -> bytes:
        data = event_data(event)
        if not data.startswith(b"{"):
            return event
        try:
            chunk = _FIELDS.decode(data)
            before = _CHOICES.decode(chunk.get("choices", b"[]"))
            after = [self._rewrite(choice) for choice in before]
        except INVALID_JSON:
            # Malformed: passed on unchanged, the client decides.
            return event
        self._thinking = not self._states or any(
            state.phase in {"undecided", "thinking"} for state in self._states.values()
        )
        if self.reasoning_format.hides_token_ids and after and all(_is_empty(choice) for choice in after):
            # The engine sent it only because of its token id.
            return b""
        if after == before:
            return event
        chunk["choices"] = msgspec.Raw(_ENCODER.encode(after))
        return b"data: %b\n\n" % _ENCODER.encode(chunk)

    def _rewrite(self, choice: Fields) -> Fields:
        index = msgspec.json.decode(choice.get("index", b"0"), type=int)
        state = self._states.setdefault(index, ThinkState(self.reasoning_format))
        return _rewrite_choice(choice, "delta", state)


def has_reasoning(answer: bytes, reasoning_format: ReasoningFormat) -> bool:
    """Whether a whole response needs rewriting: it has reasoning, or token ids that the client must not see."""
    return reasoning_format.hides_token_ids or _NON_NULL_REASONING.search(answer) is not None


def rewrite_reasoning(answer: Fields, reasoning_format: ReasoningFormat) -> Fields:
    """Rewrite a whole response, given as its top-level fields."""
    try:
        choices = [
            _rewrite_choice(choice, "message", ThinkState(reasoning_format))
            for choice in _CHOICES.decode(answer.get("choices", b"[]"))
        ]
    except INVALID_JSON:
        return answer
    if not reasoning_format.hides_token_ids:
        return {**answer, "choices": msgspec.Raw(_ENCODER.encode(choices))} if choices else answer
    without_ids = [{**choice, "token_ids": _NULL} for choice in choices]
    return {**answer, "choices": msgspec.Raw(_ENCODER.encode(without_ids)), "prompt_token_ids": _NULL}


def _pass_through(event: bytes, match: re.Match[bytes], state: ThinkState) -> bytes:
    """Rewrite an event with one more piece of a thought in place, without decoding it."""
    state.append(match["text"])
    if state.becomes_content:
        return event[: match.start("key")] + b'"content"' + event[match.end("key") :]
    mirrored = b',"reasoning_content":"%b"' % match["text"]
    return event[: match.start("end")] + mirrored + event[match.start("end") :]


def _rewrite_choice(choice: Fields, part: Literal["delta", "message"], state: ThinkState) -> Fields:
    body = _FIELDS.decode(choice.get(part, b"{}"))
    before = _read_delta(choice, body)
    after = state.apply(before)
    if not before.reasoning and after.content == before.content:
        return choice
    whole = part == "message"
    fields = {key: value for key, value in body.items() if key not in REASONING_KEYS}
    if after.content is not None or whole:
        fields["content"] = _raw(after.content)
    if after.reasoning is not None or whole:
        fields["reasoning"] = _raw(after.reasoning)
    if after.reasoning is not None:
        fields["reasoning_content"] = _raw(after.reasoning)
    return {**choice, part: _raw(fields)}


def _read_delta(choice: Fields, body: Fields) -> Delta:
    reasoning = next((text for key in REASONING_KEYS if (text := _value(body, key, str)) is not None), None)
    # vLLM's `stop_reason` is the stop word that ended generation, or the id of an end token.
    stop_word = isinstance(_value(choice, "stop_reason", str | int), str)
    return Delta(
        reasoning=reasoning,
        content=_value(body, "content", str),
        token_ids=_value(choice, "token_ids", tuple[int, ...]) or (),
        calls_tool=bool(_value(body, "tool_calls", list[msgspec.Raw])),
        ended=_value(choice, "finish_reason", str) == "stop" and not stop_word,
    )


def _is_empty(choice: Fields) -> bool:
    return all(bytes(choice.get(key, b"null")) == empty for key, empty in _EMPTY_CHOICE.items())


def _value(fields: Fields, key: str, kind: Any) -> Any:
    return msgspec.json.decode(fields.get(key, b"null"), type=kind | None)


def _raw(value: Any) -> msgspec.Raw:
    return msgspec.Raw(_ENCODER.encode(value))


def _concat(before: str, after: str | None) -> str | None:
    """Concatenate two texts; None stays None where `before` is empty."""
    return (before + (after or "")) if before else after
