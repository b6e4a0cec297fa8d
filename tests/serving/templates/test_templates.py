"""What chat templates do about thinking, and what is derived from them."""

import json
from pathlib import Path
from typing import Any

import pytest

from serving.replica import Thinking
from serving.templates.capabilities import TemplateCapabilities, template_capabilities
from serving.templates.derive import TemplateRequirements, derived
from serving.templates.plan import decide
from serving.templates.render import TemplateUnusable, renderer
from serving.templates.source import ChatTemplate, has_tokens, read_chat_template
from tests.serving.templates import families

CHAT: list[dict[str, Any]] = [{"role": "user", "content": "hi"}]
TOOL = [*CHAT, {"role": "tool", "content": "42"}]
OFF = {"enable_thinking": False}
CLOSED = "<think>\n\n</think>\n\n"


@pytest.mark.parametrize(
    "text, think_tokens, expected",
    [
        (families.QWQ, True, TemplateCapabilities("injected")),
        (families.R1, True, TemplateCapabilities("injected")),
        (families.R1_EARLY, True, TemplateCapabilities("model")),
        (families.QWEN3, True, TemplateCapabilities("model", switch=True)),
        (families.QWEN35, True, TemplateCapabilities("injected", switch=True)),
        (families.QWEN35_SMALL, True, TemplateCapabilities("injected", switch=True, off_by_default=True)),
        (families.PLAIN, True, TemplateCapabilities("model")),
        (families.PLAIN, False, TemplateCapabilities("none")),
        (families.BROKEN.replace("<think>", ""), False, TemplateCapabilities("none")),
        (None, False, TemplateCapabilities("none")),
    ],
)
def test_template_capabilities(text: str | None, think_tokens: bool, expected: TemplateCapabilities) -> None:
    """Each family is told by what its template renders; one that never mentions thinking isn't even parsed."""
    assert template_capabilities(ChatTemplate(text, think_tokens=think_tokens)) == expected


@pytest.mark.parametrize("text", [families.BROKEN, families.FUSSY, "<think>{{ messages[7].content.x }}"])
def test_templates_that_fail(text: str) -> None:
    """A template that can't be parsed, refuses a plain chat or crashes on it is told apart from one that works."""
    with pytest.raises(TemplateUnusable):
        template_capabilities(ChatTemplate(text))


@pytest.mark.parametrize("text", [families.QWEN3, families.R1_EARLY, families.PLAIN, families.LITERAL])
def test_prefix(text: str) -> None:
    """The prompt ends in the tag, once, behind what it was before; nothing else changes, thinking off least of all."""
    template = ChatTemplate(text, {"bos_token": "<s>"})
    own, now = (
        renderer(each, template.special_tokens) for each in (text, derived(template, TemplateRequirements(prefix=True)))
    )
    assert now(CHAT) == own(CHAT) + "<think>\n"
    assert now(CHAT, enable_thinking=True).count("<think>") == 1
    assert now(CHAT, add_generation_prompt=False) == own(CHAT, add_generation_prompt=False)
    assert now(CHAT, **OFF) == own(CHAT, **OFF)


@pytest.mark.parametrize("text", [families.QWQ, families.R1, families.QWEN35])
def test_a_prefix_is_never_put_twice(text: str) -> None:
    """A template that opens the thought itself renders what it did."""
    own, now = (renderer(each) for each in (text, derived(ChatTemplate(text), TemplateRequirements(prefix=True))))
    assert now(CHAT) == own(CHAT)
    assert now(CHAT).count("<think>") == 1


@pytest.mark.parametrize(
    "text, before",
    [
        (families.QWQ, "<think>\n"),
        (families.R1, "<think>\n"),
        (families.QWQ.replace("<think>\\n", "<think>"), "<think>"),
        (families.R1_EARLY, ""),
        (families.PLAIN, ""),
    ],
)
def test_switch(text: str, before: str) -> None:
    """`enable_thinking: false` closes the thought as Qwen3 does; without it all stays as it was."""
    own, now = (renderer(each) for each in (text, derived(ChatTemplate(text), TemplateRequirements(off=True))))
    assert now(CHAT, **OFF) == own(CHAT).removesuffix(before) + CLOSED
    assert now(CHAT) == own(CHAT)
    assert now(CHAT, enable_thinking=True) == own(CHAT)


def test_prefix_and_switch() -> None:
    """One template serves aliases that always think and aliases that never do."""
    own, now = (
        renderer(each)
        for each in (families.PLAIN, derived(ChatTemplate(families.PLAIN), TemplateRequirements(True, True)))
    )
    assert now(CHAT) == own(CHAT) + "<think>\n"
    assert now(CHAT, **OFF) == own(CHAT) + CLOSED


def test_only_what_was_opened_is_closed_after_a_tool() -> None:
    """R1 goes on without a header behind a tool's answer, and with no thought that the template opened."""
    now = renderer(derived(ChatTemplate(families.QWEN35_SMALL), TemplateRequirements(off=True)))
    assert now(TOOL, **OFF).endswith(CLOSED)
    assert now(TOOL, **OFF).count("</think>") == 1


def test_a_model_without_a_template_gets_none() -> None:
    """There is nothing to derive from."""
    with pytest.raises(TemplateUnusable, match="has none"):
        derived(ChatTemplate(None), TemplateRequirements(prefix=True))


def test_what_comes_out_wrong_is_refused() -> None:
    """A template that looks at its own place in the world isn't served half changed."""
    with pytest.raises(TemplateUnusable, match="renders"):
        derived(
            ChatTemplate("{% if quantgate_prompt is defined %}a{% endif %}{{ cycler(1, 2) }}"),
            TemplateRequirements(prefix=True),
        )


@pytest.mark.parametrize(
    "own, wanted, thinking, requirements",
    [
        (TemplateCapabilities("none"), {"auto"}, Thinking(tag="none"), None),
        (TemplateCapabilities("none"), {"none"}, Thinking(tag="none"), None),
        (TemplateCapabilities("none"), {"prefix"}, Thinking(tag="injected"), TemplateRequirements(prefix=True)),
        (
            TemplateCapabilities("none"),
            {"prefix", "none"},
            Thinking(tag="injected", switch=True),
            TemplateRequirements(True, True),
        ),
        (TemplateCapabilities("injected"), {"auto"}, Thinking(tag="injected"), None),
        (TemplateCapabilities("injected"), {"prefix"}, Thinking(tag="injected"), None),
        (
            TemplateCapabilities("injected"),
            {"auto", "none"},
            Thinking(tag="injected", switch=True),
            TemplateRequirements(off=True),
        ),
        (
            TemplateCapabilities("injected", switch=True),
            {"prefix", "none"},
            Thinking(tag="injected", switch=True),
            None,
        ),
        (TemplateCapabilities("model", switch=True), {"auto", "none"}, Thinking(tag="model", switch=True), None),
        (
            TemplateCapabilities("model", switch=True),
            {"prefix"},
            Thinking(tag="injected", switch=True),
            TemplateRequirements(prefix=True),
        ),
        (TemplateCapabilities("model"), {"none"}, Thinking(tag="model", switch=True), TemplateRequirements(off=True)),
        (TemplateCapabilities("model"), set(), Thinking(tag="model"), None),
        (
            TemplateCapabilities("injected", switch=True, off_by_default=True),
            {"auto"},
            Thinking(enable_thinking=False, tag="injected", switch=True),
            None,
        ),
        (
            TemplateCapabilities("injected", switch=True, off_by_default=True),
            {"prefix"},
            Thinking(enable_thinking=True, tag="injected", switch=True),
            None,
        ),
    ],
)
def test_decision(
    own: TemplateCapabilities, wanted: set[str], thinking: Thinking, requirements: TemplateRequirements | None
) -> None:
    """What the aliases of a variant ask for, against what its template does already, as a table."""
    assert decide(own, wanted) == (thinking, requirements)


def test_where_templates_lie(tmp_path: Path) -> None:
    """A file of its own comes first, then the tokenizer's configuration, of several the default."""
    tokenizer = tmp_path / "tokenizer_config.json"
    assert read_chat_template(tmp_path) == ChatTemplate(None)
    tokenizer.write_text(
        '{"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]}'
    )
    assert read_chat_template(tmp_path).text == "d"
    tokenizer.write_text(
        '{"chat_template": "c", "bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": null}'
    )
    assert read_chat_template(tmp_path) == ChatTemplate("c", {"bos_token": "<s>", "eos_token": "</s>"})
    (tmp_path / "chat_template.jinja").write_text("file")
    assert read_chat_template(tmp_path).text == "file"
    tokenizer.write_text("[oops")
    assert read_chat_template(tmp_path) == ChatTemplate("file")


def test_think_tokens(tmp_path: Path) -> None:
    """A tokenizer thinks if both tags are tokens, in whichever of its files; a tag inside a longer text is none."""
    assert not has_tokens(families.model(tmp_path, None, "<think>"), "<think>", "</think>")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "say </think> now"}))
    assert not has_tokens(tmp_path, "<think>", "</think>")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"</think>": 7}))
    assert has_tokens(tmp_path, "<think>", "</think>")


def test_rendering_is_transformers() -> None:
    """What transformers offers to templates is there."""
    render = renderer(
        "{{ strftime_now('%Y')[:2] }}{{ {'é': '<'}|tojson }}{% for m in messages %}{% if loop.index == 2 %}{% break %}"
        "{% endif %}{{ m.content }}{% endfor %}{% if tools is not none %}tools{% endif %}"
    )
    assert render([*CHAT, *CHAT]) == '20{"é": "<"}hi'
