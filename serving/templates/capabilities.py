r"""What a chat template does about thinking, found from its output.

=====================  =========================  ==================================  =========
family                 generation prompt ends in  with `enable_thinking: false` in    capabilities
=====================  =========================  ==================================  =========
QwQ, R1-distill        `<think>\n`                the same                            injected
Qwen3-Thinking, 3.5    `<think>\n`                `<think>\n\n</think>\n\n`           injected, switch
Qwen3 (hybrid)         the assistant's name       `<think>\n\n</think>\n\n`           model, switch
R1-distill (early)     the assistant's name       the same                            model
small Qwen3.5          a closed block             the same; `true` opens it           off by default, switch
all others             the assistant's name       the same                            none
=====================  =========================  ==================================  =========
"""

from dataclasses import dataclass

from serving.replica import ThinkTag
from serving.templates.render import renderer
from serving.templates.source import END_THINK, THINK, ChatTemplate

PROBE = ({"role": "user", "content": "Hello"},)


@dataclass(frozen=True, slots=True)
class TemplateCapabilities:
    """Source of the opening tag, whether `enable_thinking` has an effect, and whether thinking is off by default."""

    tag: ThinkTag
    switch: bool = False
    off_by_default: bool = False


def template_capabilities(template: ChatTemplate) -> TemplateCapabilities:
    """Render a template to find what it does; TemplateUnusable if it cannot be rendered."""
    if template.text is None or not template.mentions_thinking:
        return TemplateCapabilities("model" if template.think_tokens else "none")
    render = renderer(template.text, template.special_tokens)
    usual, on, off = render(PROBE), render(PROBE, enable_thinking=True), render(PROBE, enable_thinking=False)
    switch = on != off and not opens_thought(off)
    # A closed block by default means that this model doesn't think unless `enable_thinking` is true.
    silent = switch and usual == off and usual.rstrip().endswith(END_THINK)
    return TemplateCapabilities("injected" if opens_thought(on if silent else usual) else "model", switch, silent)


def opens_thought(prompt: str) -> bool:
    """Whether a prompt ends with an open <think>."""
    return prompt.rstrip().endswith(THINK)
