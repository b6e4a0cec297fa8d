"""Derive a chat template that opens <think> itself, or that can turn thinking off, from the model's own.

The model's template stays unchanged inside a block that captures its output; the addition depends on how that ends. So
a prefix is never doubled, and a prompt that the model's template leaves open elsewhere (after a tool result) is closed
only where it was opened.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from serving.templates.capabilities import opens_thought
from serving.templates.render import TemplateUnusable, renderer
from serving.templates.source import END_THINK, THINK, ChatTemplate

OPEN = f"{THINK}\n"
CLOSED = f"{THINK}\n\n{END_THINK}\n\n"

# `+%}` and `{%+`: jinja2 must not trim the first and the last line of what is inside.
_KEPT = "{{% set quantgate_prompt +%}}{own}{{%+ endset %}}{{{{ quantgate_prompt }}}}"
_OFF = "{% if enable_thinking is defined and enable_thinking is false %}"
_ENDS_OPEN = f"quantgate_prompt.rstrip().endswith('{THINK}')"
_ENDS_CLOSED = f"quantgate_prompt.rstrip().endswith('{END_THINK}')"
_CLOSE = (
    f"{{% if {_ENDS_OPEN} %}}{{{{ '\\n' if quantgate_prompt.endswith('\\n') else '\\n\\n' }}}}"
    f"{{{{ '{END_THINK}\\n\\n' }}}}"
    f"{{% elif not {_ENDS_CLOSED} %}}{{{{ '{THINK}\\n\\n{END_THINK}\\n\\n' }}}}{{% endif %}}"
)
_PREFIX = f"{{% if not {_ENDS_OPEN} and not {_ENDS_CLOSED} %}}{{{{ '{THINK}\\n' }}}}{{% endif %}}"

_QUESTION: tuple[Mapping[str, Any], ...] = ({"role": "user", "content": "What is one and one?"},)
_ANSWER = {"role": "assistant", "content": f"{THINK}\neasy\n{END_THINK}\n\n2"}
_CHATS = (_QUESTION, (*_QUESTION, _ANSWER, {"role": "user", "content": "And <think> two and two?"}))
_SWITCHES: tuple[dict[str, Any], ...] = ({}, {"enable_thinking": True}, {"enable_thinking": False})


@dataclass(frozen=True, slots=True)
class TemplateRequirements:
    """What a derived template must do: open <think> (`prefix`), honour `enable_thinking: false` (`off`)."""

    prefix: bool = False
    off: bool = False

    @property
    def name(self) -> str:
        """Part of the file name of a derived template."""
        return "-".join(word for word, wanted in (("prefix", self.prefix), ("switch", self.off)) if wanted)


def derived(template: ChatTemplate, requirements: TemplateRequirements) -> str:
    """Return a template that meets the requirements; TemplateUnusable if its output is not the expected one."""
    if template.text is None:
        raise TemplateUnusable("the model has none")
    # Jinja2 leaves out one newline at the end of a template; in the middle it would stay.
    own = template.text.removesuffix("\n")
    when_off = _CLOSE if requirements.off else ""
    when_on = _PREFIX if requirements.prefix else ""
    text = (
        f"{_KEPT.format(own=own)}{{% if add_generation_prompt %}}{_OFF}{when_off}{{% else %}}{when_on}{{% endif %}}"
        "{% endif %}\n{#- By quantgate, from the model's own template; written anew when that changes. #}\n"
    )
    _check(template, text, requirements)
    return text


def _check(template: ChatTemplate, text: str, requirements: TemplateRequirements) -> None:
    """Compare the output of both templates for sample chats; TemplateUnusable if it differs otherwise than required."""
    assert template.text is not None
    before, after = (renderer(each, template.special_tokens) for each in (template.text, text))
    for chat, switch, asks in product(_CHATS, _SWITCHES, (True, False)):
        own = before(chat, add_generation_prompt=asks, **switch)
        now = after(chat, add_generation_prompt=asks, **switch)
        added = _addition(own, requirements, off=switch.get("enable_thinking") is False) if asks else ""
        if now != own + added:
            raise TemplateUnusable(f"what is derived from it renders {now[-80:]!r} where the own one has {own[-80:]!r}")


def _addition(own: str, requirements: TemplateRequirements, *, off: bool) -> str:
    """Return the text that must follow the prompt of the model's own template."""
    opened, closed = opens_thought(own), own.rstrip().endswith(END_THINK)
    if not off:
        return OPEN if requirements.prefix and not opened and not closed else ""
    if not requirements.off or closed:
        return ""
    if opened:
        return ("\n" if own.endswith("\n") else "\n\n") + f"{END_THINK}\n\n"
    return CLOSED
