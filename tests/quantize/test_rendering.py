"""Chats become token ids once: special tokens come from the template, reasoning survives, the cut is real."""

from typing import Any

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantize.errors import CalibrationError
from quantize.rendering import encode, join_completion, reasoning_spans, render, require_reasoning

PLAIN = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
STRIPPING = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content.split('</think>')[-1] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
DOUBLE_BOS = "<s>" + PLAIN
CHAT = [
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "<think>\none and one\n</think>\n2"},
]


class Characters:
    """A tokenizer with a token a character; like Llama's, it adds a BOS (id 1) unless told not to."""

    eos_token: str | None = "<|end|>"

    def __init__(self, template: str) -> None:
        self._template = jinja2.Template(template)

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> str:
        """Render a chat."""
        assert options.pop("tokenize") is False
        return str(self._template.render(messages=conversation, **options))

    def __call__(self, text: str, **options: Any) -> dict[str, Any]:
        """Encode a text."""
        first = [1] if options.get("add_special_tokens", True) else []
        offsets = [(0, 0)] * len(first) + [(place, place + 1) for place in range(len(text))]
        return {"input_ids": first + [ord(character) for character in text], "offset_mapping": offsets}


def row(messages: list[dict[str, str]]) -> dict[str, Any]:
    """A chat as the parent hands it over."""
    return {"messages": messages, "where": "f:1", "sha256": "0"}


def text_of(ids: tuple[int, ...]) -> str:
    """Decode a sample."""
    return "".join(map(chr, ids))


def test_a_template_that_keeps_reasoning_is_taken_at_its_word() -> None:
    """Where the template renders the reasoning, its text is used as it is."""
    assert render(CHAT, Characters(PLAIN)) == (
        "<|user|>1+1?<|end|><|assistant|><think>\none and one\n</think>\n2<|end|>"
    )


def test_reasoning_comes_back_where_the_template_deletes_it() -> None:
    """The prompt is rendered, the raw completion appended, and the think tag is opened once."""
    assert render(CHAT, Characters(STRIPPING)) == (
        "<|user|>1+1?<|end|><|assistant|><think>\none and one\n</think>\n2<|end|>"
    )


@pytest.mark.parametrize(
    "prompt,completion,joined",
    [
        ("A", "<think>x", "A<think>x"),
        ("A<think>\n", "<think>\nx", "A<think>\nx"),
        ("A<think>\n", "x", "A<think>\nx"),
        ("A<think>", "  <think>x", "A<think>x"),
    ],
)
def test_the_think_tag_is_opened_once(prompt: str, completion: str, joined: str) -> None:
    """A prompt that ends in an open think span takes the completion without its own tag."""
    assert join_completion(prompt, completion) == joined


def test_special_tokens_come_from_the_template_alone() -> None:
    """A template that writes the BOS itself gives one, though the tokenizer would add another."""
    sample = encode(row(CHAT), Characters(DOUBLE_BOS), max_tokens=1000)
    assert text_of(sample.ids).count("<s>") == 1
    assert 1 not in sample.ids


@given(st.integers(min_value=1, max_value=300))
def test_the_cut_is_by_tokens(max_tokens: int) -> None:
    """No sample is longer than `max_tokens`, and a longer chat fills them."""
    whole = render(CHAT, Characters(PLAIN))
    sample = encode(row(CHAT), Characters(PLAIN), max_tokens)
    assert text_of(sample.ids) == whole[:max_tokens]


def test_a_chat_of_twenty_thousand_tokens_is_cut() -> None:
    """A line far beyond the limit costs no more than the limit."""
    chat = [{"role": "user", "content": "x" * 20_000}]
    assert len(encode(row(chat), Characters(PLAIN), max_tokens=2048).ids) == 2048


@pytest.mark.parametrize("template", [PLAIN, STRIPPING])
def test_reasoning_tokens_are_those_inside_think_spans(template: str) -> None:
    """The count covers the span with its tags, whichever way the text was rendered."""
    sample = encode(row(CHAT), Characters(template), max_tokens=1000)
    assert sample.reasoning_tokens == len("<think>\none and one\n</think>")


@pytest.mark.parametrize(
    "text,spans",
    [
        ("no thoughts", []),
        ("a<think>b</think>c", [(1, 17)]),
        ("a<think>cut", [(1, 11)]),
        ("opened by the prompt</think>x", [(0, 28)]),
        ("<think>a</think><think>b</think>", [(0, 16), (16, 32)]),
        ("", []),
    ],
)
def test_reasoning_spans(text: str, spans: list[tuple[int, int]]) -> None:
    """Spans may be opened by the prompt and cut by the limit."""
    assert reasoning_spans(text) == spans


def test_reasoning_that_is_cut_off_everywhere_is_refused() -> None:
    """Where no sample keeps a reasoning token, calibration would never see any: that is an error with a line."""
    rows = [row([*CHAT, {"role": "user", "content": "thanks"}])]
    samples = [encode(rows[0], Characters(STRIPPING), max_tokens=1000)]
    with pytest.raises(CalibrationError, match="f:1: the chat template deletes all <think> reasoning"):
        require_reasoning(rows, samples)


def test_text_without_reasoning_needs_none() -> None:
    """Ordinary chats are fine as they are."""
    rows = [row([{"role": "user", "content": "hello"}])]
    require_reasoning(rows, [encode(rows[0], Characters(PLAIN), max_tokens=10)])
