"""Rows -> text by a base's own chat template, with the reasoning that many templates delete."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from quantize.calibration.records import Message, Record
from quantize.calibration.thinking import (
    THINK,
    Markers,
    Span,
    converted,
    divided,
    markers_of,
    reasoning_spans,
    thoughts,
)

# Stands for an answer where only what a template writes after it matters.
_MARK = "quantgate-answer"


class Tokenizer(Protocol):
    """What we need of a transformers tokenizer.

    `apply_chat_template` renders text; calling it gives `input_ids` and, on request, `offset_mapping`: for each
    token the (start, end) of the characters it came from.
    """

    eos_token: str | None
    bos_token_id: int | None

    def apply_chat_template(self, conversation: list[dict[str, Any]], **options: Any) -> str: ...

    def __call__(self, text: str, **options: Any) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Rendered:
    """A row as text; the character ranges of its reasoning, and of its last answer without that."""

    text: str
    reasoning: tuple[Span, ...]
    answer: Span


def render(record: Record, tokenizer: Tokenizer) -> Rendered:
    """Render a row: bare text as it is, a completion after its prompt, a chat with its last reasoning restored."""
    markers = markers_of(tokenizer)
    if record.text:
        spans = reasoning_spans(record.text, markers)
        return Rendered(record.text, tuple(spans), (spans[-1][1] if spans else 0, len(record.text)))
    record = in_markers(record, markers)
    template = Template(tokenizer, markers, record.tools)
    if record.completion:
        return _completed(record.messages, record.completion, template, finished=record.finished)
    last = record.messages[-1]
    text = template.render(record.messages)
    restorable = last.role == "assistant" and not last.tool_calls
    if restorable and any(thought not in text for thought in thoughts(last.content, markers)):
        return _completed(record.messages[:-1], last.content, template, finished=True)
    return _located(text, record.messages, markers)


def in_markers(record: Record, markers: Markers) -> Record:
    """Write the reasoning of a row's answers in the markers of a model's family."""
    turns = [
        replace(turn, content=converted(turn.content, markers)) if turn.role == "assistant" else turn
        for turn in record.messages
    ]
    return replace(record, messages=tuple(turns), completion=converted(record.completion, markers))


def has_reasoning(record: Record, markers: Markers) -> bool:
    """Whether an answer of a row holds reasoning that was closed."""
    answers = [turn.content for turn in record.messages if turn.role == "assistant"]
    return any(one.end in text for one in {THINK, markers} for text in (*answers, record.completion, record.text))


def join_completion(prompt: str, completion: str, markers: Markers = THINK) -> str:
    """Append a raw completion to a prompt that may already have opened the think span."""
    if prompt.rstrip().endswith(markers.start) and completion.lstrip().startswith(markers.start):
        completion = completion.lstrip().removeprefix(markers.start).lstrip("\n")
    return prompt + completion


def render_prompt(messages: Sequence[Message], tokenizer: Tokenizer, tools: str = "") -> str:
    """Render what a server would put before the answer."""
    return Template(tokenizer, markers_of(tokenizer), tools).render_prompt(messages)


def closing(tokenizer: Tokenizer) -> str:
    """Find what ends an answer, by the template's own word; where it writes nothing, the end-of-text token."""
    return Template(tokenizer).closing()


@dataclass(frozen=True, slots=True)
class Template:
    """A tokenizer's chat template, with the functions that a chat offers."""

    tokenizer: Tokenizer
    markers: Markers = THINK
    tools: str = ""

    def render(self, messages: Sequence[Message], **options: Any) -> str:
        """Render a chat; jinja2.TemplateError where the template refuses it."""
        chat = [self._message(turn) for turn in messages]
        if self.tools:
            options["tools"] = json.loads(self.tools)
        text = self.tokenizer.apply_chat_template(chat, tokenize=False, **options)
        return text if _has_content(text, messages) else self._rendered_in_parts(chat, text, options)

    def _rendered_in_parts(self, chat: Sequence[dict[str, Any]], text: str, options: dict[str, Any]) -> str:
        """Render with contents as lists of parts, as vLLM does for templates that drop plain text; else give `text`."""
        from jinja2 import TemplateError  # noqa: PLC0415

        parts = [{**turn, "content": [{"type": "text", "text": turn.get("content") or ""}]} for turn in chat]
        try:
            in_parts = self.tokenizer.apply_chat_template(parts, tokenize=False, **options)
        except (TemplateError, TypeError):
            return text
        return in_parts if len(in_parts) > len(text) else text

    def render_prompt(self, messages: Sequence[Message]) -> str:
        """Render what a server would put before the answer."""
        return self.render(messages, add_generation_prompt=True)

    def closing(self) -> str:
        """Find what ends an answer, by the template's own word; where it writes nothing, the end-of-text token."""
        text = self.render([Message("user", "?"), Message("assistant", _MARK)])
        _, answered, after = text.rpartition(_MARK)
        return (after.strip() if answered else "") or self.tokenizer.eos_token or ""

    def _message(self, turn: Message) -> dict[str, Any]:
        if turn.role != "assistant" or not self.markers.field:
            return turn.to_template()
        thought, answer = divided(turn.content, self.markers)
        beside = {self.markers.field: thought} if thought else {}
        return {**turn.to_template(), "content": answer, **beside}


def _has_content(text: str, messages: Sequence[Message]) -> bool:
    """Tell whether a rendered chat has any content of its messages; True if they have none."""
    contents = [turn.content.strip() for turn in messages if turn.content.strip()]
    return not contents or any(content in text for content in contents)


def _completed(messages: Sequence[Message], completion: str, template: Template, *, finished: bool) -> Rendered:
    """Render the prompt, append the answer raw; reasoning of earlier turns is what the template makes of it."""
    markers = template.markers
    prompt = template.render_prompt(messages)
    text = join_completion(prompt, completion, markers)
    before = _located(prompt, messages, markers)
    # The tag that opens the reasoning may be the prompt's last word.
    start = opened.start() if (opened := _open_before(markers).search(prompt)) else len(prompt)
    spans = [(start + first, start + last) for first, last in reasoning_spans(text[start:], markers)]
    if finished:
        text += template.closing()
    return Rendered(text, (*before.reasoning, *spans), (spans[-1][1] if spans else len(prompt), len(text)))


def _located(text: str, messages: Sequence[Message], markers: Markers) -> Rendered:
    """Find the turns of a chat in its rendered text, in order; tags that a user or a system prompt names are none."""
    spans: list[Span] = []
    place, answer = 0, (len(text), len(text))
    for turn in messages:
        pieces = thoughts(turn.content, markers) if turn.role == "assistant" else []
        for piece in pieces:
            at = text.find(piece, place)
            if at >= 0:
                spans.append(_with_tags(text, at, at + len(piece), markers))
                place = spans[-1][1]
        said = divided(turn.content, markers)[1].strip() if pieces else turn.content.strip()
        at = text.find(said, place)
        if turn is messages[-1] and turn.role == "assistant":
            answer = (place if pieces else max(at, place), len(text))
        place = at + len(said) if at >= 0 else place
    return Rendered(text, tuple(spans), answer)


def _with_tags(text: str, start: int, end: int, markers: Markers) -> Span:
    opened = _open_before(markers).search(text[:start])
    closed = re.compile(rf"\s*{re.escape(markers.end)}").match(text, end)
    return opened.start() if opened else start, closed.end() if closed else end


def _open_before(markers: Markers) -> re.Pattern[str]:
    return re.compile(rf"{re.escape(markers.start)}\s*\Z")
