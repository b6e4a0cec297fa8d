"""Rows become text: templates that delete reasoning don't get their way with the last answer."""

import json
from typing import Any

import jinja2
import pytest

from quantize.calibration.parsing import parse_line
from quantize.calibration.records import Message, Record
from quantize.calibration.rendering import closing, join_completion, render, render_prompt
from quantize.calibration.thinking import reasoning_spans, thoughts
from tests.quantize.templates import ANSWER, CHAT, FAMILIES, PLAIN, QWQ, R1

EARLIER = [
    {"role": "user", "content": "0+1?"},
    {"role": "assistant", "content": "<think>\nzero and one\n</think>\n\n1"},
]
ASKED_IN_TAGS = [{"role": "system", "content": "Reason within <think> tags. </think> closes."}]


class Templated:
    """A tokenizer with a template alone."""

    eos_token: str | None = "<|eos|>"
    bos_token_id: int | None = None

    def __init__(self, template: str) -> None:
        self._template = jinja2.Template(template)

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> str:
        """Render a chat."""
        assert options.pop("tokenize") is False
        return str(self._template.render(messages=conversation, bos_token="<|bos|>", **options))

    def __call__(self, text: str, **options: Any) -> dict[str, Any]:
        """Nothing is tokenized here."""
        raise AssertionError


def row(**line: Any) -> Record:
    """The row of a line."""
    read = parse_line(json.dumps(line), "f:1")
    assert isinstance(read, Record)
    return read


def reasoned(family: str, *messages: dict[str, str]) -> list[str]:
    """The reasoning in a chat's text, by its spans."""
    rendered = render(row(messages=messages), Templated(FAMILIES[family]))
    return [rendered.text[start:end] for start, end in rendered.reasoning]


@pytest.mark.parametrize(
    "family,text",
    [
        ("plain", f"<|user|>1+1?<|end|><|assistant|>{ANSWER}<|end|>"),
        ("r1", f"<|bos|><|User|>1+1?<|Assistant|>{ANSWER}<|eos|>"),
        ("qwq", f"<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n{ANSWER}<|im_end|>"),
        ("qwen3", f"<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n{ANSWER}<|im_end|>\n"),
        ("emptying", f"<|user|>1+1?<|end|><|assistant|>{ANSWER}<|end|>"),
    ],
)
def test_the_last_reasoning_is_in_the_text_of_every_family(family: str, text: str) -> None:
    """Once, in its place, with its tags opened once and the turn closed as the template closes it."""
    assert render(row(messages=CHAT), Templated(FAMILIES[family])).text == text


@pytest.mark.parametrize("family", FAMILIES)
def test_reasoning_is_located_with_its_tags(family: str) -> None:
    """A system prompt that talks about tags holds no reasoning."""
    assert reasoned(family, *ASKED_IN_TAGS, *CHAT) == ["<think>\none and one\n</think>"]


@pytest.mark.parametrize(
    "family,kept", [("plain", True), ("r1", False), ("qwq", False), ("qwen3", False), ("emptying", False)]
)
def test_earlier_turns_show_what_the_model_would_see(family: str, kept: bool) -> None:
    """The last answer keeps its reasoning everywhere; earlier ones are as the template wants them."""
    first = ["<think>\nzero and one\n</think>"] if kept else []
    assert reasoned(family, *EARLIER, *CHAT) == [*first, "<think>\none and one\n</think>"]


@pytest.mark.parametrize("family,kept", [("plain", True), ("r1", False), ("qwq", False), ("qwen3", False)])
def test_a_chat_that_ends_with_a_question_has_no_answer_to_restore(family: str, kept: bool) -> None:
    """Its text is the template's."""
    assert bool(reasoned(family, *CHAT, {"role": "user", "content": "thanks"})) == kept


@pytest.mark.parametrize("family", FAMILIES)
def test_the_answer_is_what_follows_the_reasoning(family: str) -> None:
    """To the end of the text, the closing token included."""
    rendered = render(row(messages=[*EARLIER, *CHAT]), Templated(FAMILIES[family]))
    start, end = rendered.answer
    assert end == len(rendered.text)
    assert rendered.text[start:].strip() in ("2<|end|>", "2<|eos|>", "2<|im_end|>")


@pytest.mark.parametrize(
    "content,text",
    [
        ("just 2", "just 2<|end|>"),
        ("one and one</think>2", "2<|end|>"),
        ("<think>a</think>x<think>b</think>2", "2<|end|>"),
    ],
)
def test_the_answer_of_a_plain_turn(content: str, text: str) -> None:
    """Without reasoning it is the turn; reasoning that the prompt opened, and several pieces of it, are left out."""
    chat = [{"role": "user", "content": "2"}, {"role": "assistant", "content": content}]
    rendered = render(row(messages=chat), Templated(PLAIN))
    assert rendered.text[rendered.answer[0] :] == text


@pytest.mark.parametrize(
    "family,text",
    [
        ("plain", "<|user|>1+1?<|end|><|assistant|>2<|end|>"),
        ("r1", "<|bos|><|User|>1+1?<|Assistant|><think>\n2<|eos|>"),
        ("qwq", "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n<think>\n2<|im_end|>"),
    ],
)
def test_a_completion_follows_its_prompt_raw(family: str, text: str) -> None:
    """As a server would have it: the prompt with all that asks for an answer, the completion, the end of a turn."""
    asked = [{"role": "user", "content": "1+1?"}]
    assert render(row(prompt="1+1?", completion="2"), Templated(FAMILIES[family])).text == text
    assert render(row(prompt=asked, completion="2"), Templated(FAMILIES[family])).text == text


@pytest.mark.parametrize(
    "completion,reasoning,answer",
    [
        ("one and one\n</think>\n\n2", "<think>\none and one\n</think>", "\n\n2"),
        ("<think>\none and one\n</think>\n\n2", "<think>\none and one\n</think>", "\n\n2"),
        ("one and", "<think>\none and", ""),
    ],
)
def test_an_unfinished_completion_is_left_open(completion: str, reasoning: str, answer: str) -> None:
    """What a limit cut gets no end token, and all of an open thought is reasoning."""
    mark = {"from": "a" * 64, "finished": False}
    rendered = render(row(prompt="1+1?", completion=completion, self_generated=mark), Templated(QWQ))
    assert [rendered.text[start:end] for start, end in rendered.reasoning] == [reasoning]
    assert rendered.text.endswith(reasoning + answer)
    assert rendered.text[slice(*rendered.answer)] == answer


def test_bare_text_is_left_as_it_is() -> None:
    """No template; its think spans count all the same."""
    rendered = render(row(text="a <think>b</think> c"), Templated(PLAIN))
    assert (rendered.text, rendered.reasoning, rendered.answer) == ("a <think>b</think> c", ((2, 18),), (18, 20))


@pytest.mark.parametrize(
    "template,end",
    [
        (PLAIN, "<|end|>"),
        (R1, "<|eos|>"),
        (QWQ, "<|im_end|>"),
        ("{{ messages[-1].content }}", "<|eos|>"),
        ("a", "<|eos|>"),
    ],
)
def test_the_end_of_a_turn_is_the_templates_own(template: str, end: str) -> None:
    """Where it writes none, the tokenizer's end of text."""
    assert closing(Templated(template)) == end


def test_a_prompt_asks_for_an_answer() -> None:
    """It is what a server would send to the model."""
    assert render_prompt([Message("user", "a")], Templated(QWQ)).endswith("<|im_start|>assistant\n<think>\n")


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


@pytest.mark.parametrize(
    "text,spans",
    [
        ("no thoughts", []),
        ("a<think>b</think>c", [(1, 17)]),
        ("a<think>cut", [(1, 11)]),
        ("opened by the prompt</think>x", [(0, 28)]),
        ("<think>a</think><think>b</think>", [(0, 16), (16, 32)]),
        ("<think>\n\n</think>nothing thought", []),
        ("<think>a<think>b</think>c", [(0, 24)]),
        ("<think>a</think>b</think>c", [(0, 16)]),
        ("", []),
    ],
)
def test_reasoning_spans(text: str, spans: list[tuple[int, int]]) -> None:
    """Spans may be opened by the prompt and cut by the limit; empty ones are no reasoning."""
    assert reasoning_spans(text) == spans


def test_thoughts_come_without_tags() -> None:
    """Each piece of reasoning by itself."""
    assert thoughts("<think>\na\n</think>x<think>b</think>y") == ["a", "b"]
