"""Reasoning in the markers of other families: found in the template, translated, rendered, counted."""

import json
from typing import Any

import pytest

from quantize.calibration.parsing import parse_line
from quantize.calibration.records import Record
from quantize.calibration.rendering import render
from quantize.calibration.thinking import (
    HARMONY,
    MARKERS,
    THINK,
    Markers,
    converted,
    divided,
    markers_of,
    reasoning_spans,
)
from tests.quantize.calibration.test_rendering import Templated
from tests.quantize.templates import FAMILIES, PLAIN, QWQ

MISTRAL, SEED = MARKERS[1:3]
# What gpt-oss does: reasoning is a field of the last answer, and an error in its content.
GPT_OSS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% if '<|channel|>' in m.content %}{{ 1 / 0 }}{% endif %}"
    "{% if loop.last and m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>"
    "{% endif %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m.content }}{{ '<|return|>' if loop.last else '<|end|>' }}"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
MAGISTRAL = "{# [THINK] #}" + PLAIN
SEED_OSS = "{# <seed:think> #}" + PLAIN
THOUGHT = {
    "think": "<think>\none and one\n</think>\n\n2",
    "mistral": "[THINK]\none and one\n[/THINK]2",
    "seed": "<seed:think>\none and one\n</seed:think>2",
    "harmony": "<|channel|>analysis<|message|>one and one<|end|><|start|>assistant<|channel|>final<|message|>2",
}


class Named(Templated):
    """A tokenizer whose template can be read."""

    def __init__(self, template: str) -> None:
        super().__init__(template)
        self.chat_template = template


def row_of(**line: Any) -> Record:
    """The row of a line."""
    row = parse_line(json.dumps(line), "f:1")
    assert isinstance(row, Record)
    return row


def chat(answer: str, *earlier: dict[str, str]) -> Record:
    """A chat with one question at its end, and its answer."""
    return row_of(messages=[*earlier, {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": answer}])


@pytest.mark.parametrize(
    "template,markers",
    [
        (PLAIN, THINK),
        (QWQ, THINK),
        (MAGISTRAL, MISTRAL),
        (SEED_OSS, SEED),
        ("{{ '</seed:think>' }}", SEED),
        (GPT_OSS, HARMONY),
        (PLAIN.replace("<|user|>", "<|end|>"), THINK),
    ],
)
def test_markers_are_seen_in_the_template(template: str, markers: Markers) -> None:
    """Where it has none they are the usual ones."""
    assert markers_of(Named(template)) == markers
    assert markers_of(Templated(template)) == THINK


@pytest.mark.parametrize("markers", [THINK, MISTRAL, SEED, HARMONY], ids=list(THOUGHT))
@pytest.mark.parametrize("content", THOUGHT.values(), ids=list(THOUGHT))
def test_reasoning_is_translated(content: str, markers: Markers) -> None:
    """From any family's markers to any other's; what is in the right ones already keeps every character."""
    told = converted(content, markers)
    assert divided(told, markers) == ("one and one", "2")
    assert converted(told, markers) == told
    assert len(reasoning_spans(told, markers)) == 1
    if markers.start in content:
        assert told == content


@pytest.mark.parametrize("content", ["Write [THINK] there, [/THINK] here.", "[THINK] alone", "a", ""])
def test_other_text_is_left_alone(content: str) -> None:
    """An answer that only names the markers of another family has no reasoning."""
    assert converted(content, THINK) == content


@pytest.mark.parametrize("content", THOUGHT.values(), ids=list(THOUGHT))
@pytest.mark.parametrize(
    "template,reasoning,answer",
    [
        (FAMILIES["qwen3"], "<think>\none and one\n</think>", "2<|im_end|>"),
        (QWQ, "<think>\none and one\n</think>", "2<|im_end|>"),
        (MAGISTRAL, "[THINK]\none and one\n[/THINK]", "2<|end|>"),
        (SEED_OSS, "<seed:think>\none and one\n</seed:think>", "2<|end|>"),
        (GPT_OSS, "<|channel|>analysis<|message|>one and one<|end|>", "2<|return|>"),
    ],
)
def test_reasoning_is_rendered_as_the_model_writes_it(content: str, template: str, reasoning: str, answer: str) -> None:
    """Whatever markers the data has; both are found in the text."""
    rendered = render(chat(content), Named(template))
    assert [rendered.text[start:end] for start, end in rendered.reasoning] == [reasoning]
    assert rendered.text[slice(*rendered.answer)].strip().endswith(answer)
    assert rendered.text.count("one and one") == 1


@pytest.mark.parametrize("finished", [True, False])
def test_raw_answers_of_a_model_with_channels(finished: bool) -> None:
    """What it wrote itself, or what a server took apart, continues its prompt."""
    mark = {"from": "a" * 64, "finished": finished}
    end = "<|return|>" if finished else ""
    for completion in (THOUGHT["harmony"], THOUGHT["think"]):
        rendered = render(row_of(prompt="1+1?", completion=completion, self_generated=mark), Named(GPT_OSS))
        assert rendered.text == f"<|start|>user<|message|>1+1?<|end|><|start|>assistant{THOUGHT['harmony']}{end}"
        assert [rendered.text[slice(*span)] for span in rendered.reasoning] == [
            "<|channel|>analysis<|message|>one and one<|end|>"
        ]


def test_earlier_answers_keep_no_channel_of_reasoning() -> None:
    """The template shows only that of the last answer."""
    earlier = ({"role": "user", "content": "0?"}, {"role": "assistant", "content": THOUGHT["think"]})
    rendered = render(chat(THOUGHT["mistral"], *earlier), Named(GPT_OSS))
    assert rendered.text.count("analysis") == len(rendered.reasoning) == 1
