r"""What a chat template does about thinking, seen from what it renders.

=====================  =========================  ==================================  =========
family                 generation prompt ends in  with `enable_thinking: false` in    habits
=====================  =========================  ==================================  =========
QwQ, R1-distill        `<think>\n`                the same                            injected
Qwen3-Thinking, 3.5    `<think>\n`                `<think>\n\n</think>\n\n`           injected, switch
Qwen3 (hybrid)         the assistant's name       `<think>\n\n</think>\n\n`           model, switch
R1-distill (early)     the assistant's name       the same                            model
small Qwen3.5          a closed block             the same; `true` opens it           off by default, switch
everybody else         the assistant's name       the same                            none
=====================  =========================  ==================================  =========
"""

from dataclasses import dataclass

from serving.replica import ThinkTag
from serving.templates.render import renderer
from serving.templates.source import END_THINK, THINK, ChatTemplate

PROBE = ({"role": "user", "content": "Hello"},)


@dataclass(frozen=True, slots=True)
class TemplateCapabilities:
    """Who writes the opening tag; whether `enable_thinking` changes anything; whether it thinks only when told to."""

    tag: ThinkTag
    switch: bool = False
    off_by_default: bool = False


def habits(template: ChatTemplate) -> TemplateCapabilities:
    """Find out what a template does; TemplateUnusable if it can't be rendered."""
    if template.text is None or not template.mentions_thinking:
        return TemplateCapabilities("model" if template.think_tokens else "none")
    render = renderer(template.text, template.special_tokens)
    usual, on, off = render(PROBE), render(PROBE, enable_thinking=True), render(PROBE, enable_thinking=False)
    switch = on != off and not opens_thought(off)
    # A closed block that is there unasked means that this model doesn't think unless told to.
    silent = switch and usual == off and usual.rstrip().endswith(END_THINK)
    return TemplateCapabilities("injected" if opens_thought(on if silent else usual) else "model", switch, silent)


def opens_thought(prompt: str) -> bool:
    """Tell whether a prompt ends inside a thought that has just begun."""
    return prompt.rstrip().endswith(THINK)
