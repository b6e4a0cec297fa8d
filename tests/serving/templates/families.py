"""Short chat templates that do about thinking what those of well-known families do."""

import json
from pathlib import Path

_TURNS = (
    "{%- for m in messages %}\n"
    "    {{- '<|im_start|>' + m.role + '\\n' }}\n"
    "    {%- if m.role == 'assistant' %}\n"
    "        {{- m.content.split('</think>')[-1].lstrip('\\n') }}\n"
    "    {%- else %}\n"
    "        {{- m.content }}\n"
    "    {%- endif %}\n"
    "    {{- '<|im_end|>\\n' }}\n"
    "{%- endfor %}\n"
)
_HEADER = "{{- '<|im_start|>assistant\\n' }}"


def _asks(block: str) -> str:
    return "{%- if add_generation_prompt %}\n    " + block + "\n{%- endif %}\n"


QWQ = _TURNS + _asks("{{- '<|im_start|>assistant\\n<think>\\n' }}")
R1 = (
    "{% set ns = namespace(is_tool=false) %}{{ bos_token }}{%- for m in messages %}{%- if m.role == 'user' %}"
    "{%- set ns.is_tool = false -%}{{ '<|User|>' + m.content }}{%- endif %}{%- if m.role == 'assistant' %}"
    "{{ '<|Assistant|>' + m.content.split('</think>')[-1] + '<|end|>' }}{%- endif %}{%- if m.role == 'tool' %}"
    "{%- set ns.is_tool = true -%}{{ '<|tool|>' + m.content }}{%- endif %}{%- endfor -%}"
    "{% if add_generation_prompt and not ns.is_tool %}{{ '<|Assistant|><think>\\n' }}{% endif %}"
)
R1_EARLY = R1.replace("<think>\\n", "")
_CLOSE = (
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
)
QWEN3 = _TURNS + _asks(_HEADER + _CLOSE)
QWEN35 = _TURNS + _asks(_HEADER + _CLOSE.replace("{%- endif %}", "{%- else %}{{- '<think>\\n' }}{%- endif %}"))
QWEN35_SMALL = _TURNS + _asks(
    _HEADER + "{%- if enable_thinking is defined and enable_thinking is true %}{{- '<think>\\n' }}"
    "{%- else %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Text outside of tags, whose last line feed belongs to the prompt; a macro; blanks before a tag.
LITERAL = (
    "{% macro turn(m) %}<|{{ m.role }}|>{{ m.content }}{% endmacro %}{% generation %}{% endgeneration %}\n"
    "{% for m in messages %}\n    {{ turn(m) }}\n{% endfor %}\n"
    "{% if add_generation_prompt %}\n<|assistant|>\n{% endif %}\n\n"
)
BROKEN = "{% for m in messages %}<think>"
FUSSY = "{{ raise_exception('no <think>') }}"


def model(folder: Path, template: str | None = None, *tokens: str) -> Path:
    """A model directory with a chat template, and with some words as tokens of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"architectures": ["Llama"], "dtype": "bfloat16"}))
    added = [{"id": number, "content": token, "special": False} for number, token in enumerate(tokens)]
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "<s>"}, "pad_token": None}))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder
