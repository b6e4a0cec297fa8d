"""Rows -> text by a base's own chat template, with the reasoning that many templates delete."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from quantize.text.rows import Message, Row

_TAG = re.compile(r"</?think>")
_OPEN_BEFORE = re.compile(r"<think>\s*\Z")
_CLOSED_AFTER = re.compile(r"\s*</think>")
# Stands for an answer where only what a template writes after it matters.
_MARK = "quantgate-answer"

Span = tuple[int, int]


class Tokenizer(Protocol):
    """What we need of a transformers tokenizer.

    `apply_chat_template` renders text; calling it gives `input_ids` and, on request, `offset_mapping`: for each
    token the (start, end) of the characters it came from.
    """

    eos_token: str | None
    bos_token_id: int | None

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> str: ...

    def __call__(self, text: str, **options: Any) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Rendered:
    """A row as text; the character ranges of its reasoning, and of its last answer without that."""

    text: str
    reasoning: tuple[Span, ...]
    answer: Span


def render(row: Row, tokenizer: Tokenizer) -> Rendered:
    """Render a row: bare text as it is, a completion after its prompt, a chat with its last reasoning restored."""
    if row.text:
        spans = reasoning_spans(row.text)
        return Rendered(row.text, tuple(spans), (spans[-1][1] if spans else 0, len(row.text)))
    if row.completion:
        return _completed(row.messages, row.completion, tokenizer, finished=row.finished)
    last = row.messages[-1]
    text = _templated(row.messages, tokenizer)
    if last.role == "assistant" and any(thought not in text for thought in thoughts(last.content)):
        return _completed(row.messages[:-1], last.content, tokenizer, finished=True)
    return _located(text, row.messages)


def join_completion(prompt: str, completion: str) -> str:
    """Append a raw completion to a prompt that may already have opened the think span."""
    if prompt.rstrip().endswith("<think>") and completion.lstrip().startswith("<think>"):
        completion = completion.lstrip().removeprefix("<think>").lstrip("\n")
    return prompt + completion


def render_prompt(messages: Sequence[Message], tokenizer: Tokenizer) -> str:
    """Render what a server would put before the answer."""
    return _templated(messages, tokenizer, add_generation_prompt=True)


def closing(tokenizer: Tokenizer) -> str:
    """Find what ends an answer, by the template's own word; where it writes nothing, the end-of-text token."""
    text = _templated([Message("user", "?"), Message("assistant", _MARK)], tokenizer)
    _, answered, after = text.rpartition(_MARK)
    return (after.strip() if answered else "") or tokenizer.eos_token or ""


def thoughts(content: str) -> list[str]:
    """Take the pieces of reasoning out of an answer, without their tags."""
    return [_TAG.sub("", content[start:end]).strip() for start, end in reasoning_spans(content)]


def reasoning_spans(answer: str) -> list[Span]:
    """Find the character ranges of reasoning in an answer, tags included, but not those of empty thoughts.

    A first span that only closes began with the answer (the prompt had opened it); one that only opens was cut.
    """
    spans: list[Span] = []
    opened: int | None = None
    for tag in _TAG.finditer(answer):
        if tag[0] == "<think>":
            opened = tag.start() if opened is None else opened
        elif opened is not None or not spans:
            spans.append((opened or 0, tag.end()))
            opened = None
    if opened is not None:
        spans.append((opened, len(answer)))
    return [(start, end) for start, end in spans if _TAG.sub("", answer[start:end]).strip()]


def _completed(messages: Sequence[Message], completion: str, tokenizer: Tokenizer, *, finished: bool) -> Rendered:
    """Render the prompt, append the answer raw; reasoning of earlier turns is what the template makes of it."""
    prompt = render_prompt(messages, tokenizer)
    text = join_completion(prompt, completion)
    before = _located(prompt, messages)
    # The tag that opens the reasoning may be the prompt's last word.
    start = opened.start() if (opened := _OPEN_BEFORE.search(prompt)) else len(prompt)
    spans = [(start + first, start + last) for first, last in reasoning_spans(text[start:])]
    if finished:
        text += closing(tokenizer)
    return Rendered(text, (*before.reasoning, *spans), (spans[-1][1] if spans else len(prompt), len(text)))


def _located(text: str, messages: Sequence[Message]) -> Rendered:
    """Find the turns of a chat in its rendered text, in order; tags that a user or a system prompt names are none."""
    spans: list[Span] = []
    place, answer = 0, (len(text), len(text))
    for turn in messages:
        pieces = thoughts(turn.content) if turn.role == "assistant" else []
        for piece in pieces:
            at = text.find(piece, place)
            if at >= 0:
                spans.append(_with_tags(text, at, at + len(piece)))
                place = spans[-1][1]
        said = turn.content[reasoning_spans(turn.content)[-1][1] :].strip() if pieces else turn.content.strip()
        at = text.find(said, place)
        if turn is messages[-1] and turn.role == "assistant":
            answer = (place if pieces else max(at, place), len(text))
        place = at + len(said) if at >= 0 else place
    return Rendered(text, tuple(spans), answer)


def _with_tags(text: str, start: int, end: int) -> Span:
    opened, closed = _OPEN_BEFORE.search(text[:start]), _CLOSED_AFTER.match(text, end)
    return opened.start() if opened else start, closed.end() if closed else end


def _templated(messages: Sequence[Message], tokenizer: Tokenizer, **options: Any) -> str:
    chat = [{"role": turn.role, "content": turn.content} for turn in messages]
    return tokenizer.apply_chat_template(chat, tokenize=False, **options)
