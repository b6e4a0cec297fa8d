"""Chat template -> the tool parser of vLLM that reads the calls which it teaches the model to write.

A template that doesn't show tools to the model has no parser: the model would not know of them. Sources are vLLM's
guide ("guide", docs/features/tool_calling.md) and the marks in its parsers (vllm/tool_parsers, vllm/parser of 0.32).
"""

import json
from collections.abc import Collection, Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from serving.arguments import option
from serving.replica import Launch
from serving.templates.capabilities import PROBE
from serving.templates.render import TemplateUnusable, renderer
from serving.templates.source import ChatTemplate, chosen_template, has_tokens, read_chat_template

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "look_up_weather",
        "description": "Looks up the weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How some families write a call: their template has all `marks`, and `model_types`, if any, names them.

    Without `tokens` in the tokenizer vLLM does not start with this parser.
    """

    parser: str
    families: str
    marks: tuple[str, ...]
    source: str
    tokens: tuple[str, ...] = ()
    model_types: tuple[str, ...] = ()


_DEEPSEEK = tuple(f"<｜tool▁{word}｜>" for word in ("calls▁begin", "calls▁end", "call▁begin", "call▁end"))  # noqa: RUF001
# The first that fits: many families write `<tool_call>`, and differ in what stands inside.
TOOL_FORMATS = (
    ToolFormat("openai", "gpt-oss", ("<|start|>", "<|channel|>"), "guide"),
    ToolFormat("seed_oss", "Seed-OSS", ("<seed:tool_call>",), "seed_oss.py"),
    ToolFormat("minimax_m3", "MiniMax-M3", ("]<]minimax[>[",), "minimax_m3.py"),
    ToolFormat("minimax_m2", "MiniMax-M2", ("<minimax:tool_call>",), "minimax_m2.py"),
    ToolFormat("step3p5", "Step-3.5", ("<function=",), "step3p5.py", model_types=("step3p5",)),
    ToolFormat("mimo", "MiMo", ("<function=",), "mimo.py", model_types=("mimo", "mimo_v2_flash", "mimo_v2")),
    ToolFormat("qwen3_coder", "Qwen3-Coder, Qwen3.5, Nemotron 3", ("<function=", "<parameter="), "guide"),
    ToolFormat("glm47", "GLM-4.7, GLM-5", ("<arg_key>", "{function-name}<arg_key>"), "guide"),
    ToolFormat("glm45", "GLM-4.5, GLM-4.6", ("<arg_key>", "{function-name}"), "guide"),
    ToolFormat("kimi_k2", "Kimi-K2", ("<|tool_calls_section_begin|>",), "guide"),
    ToolFormat("deepseek_v3", "DeepSeek-V3, R1-0528", (_DEEPSEEK[0], "```json"), "guide", _DEEPSEEK),
    ToolFormat("deepseek_v31", "DeepSeek-V3.1", (_DEEPSEEK[0],), "guide", _DEEPSEEK),
    ToolFormat("step3", "Step-3", ("<｜tool_calls_begin｜>",), "step3_tool_parser.py"),  # noqa: RUF001
    ToolFormat("mistral", "Mistral, Ministral, Magistral, Devstral", ("[TOOL_CALLS]",), "guide"),
    ToolFormat("llama4_pythonic", "Llama 4", ("<|python_start|>",), "guide"),
    ToolFormat("llama3_json", "Llama 3.1 to 3.3", ("<|start_header_id|>ipython",), "guide", ("<|python_tag|>",)),
    ToolFormat("functiongemma", "FunctionGemma", ("<start_function_call>",), "guide"),
    ToolFormat("gemma4", "Gemma 4", ("<|tool_call>",), "gemma4.py"),
    ToolFormat("granite4", "Granite 4", ("<tool_call>",), "guide", model_types=("granitemoehybrid",)),
    ToolFormat("granite", "Granite 3", ("<|tool_call|>",), "guide", model_types=("granite", "granitemoe")),
    ToolFormat("lfm2", "LFM2", ("<|tool_list_start|>",), "lfm2_tool_parser.py", ("<|tool_call_start|>",)),
    ToolFormat("olmo3", "Olmo 3", ("<function_calls>",), "guide", model_types=("olmo3",)),
    ToolFormat("hunyuan_a13b", "Hunyuan-A13B", ("<tool_calls>",), "guide", model_types=("hunyuan_v1_moe",)),
    ToolFormat("jamba", "Jamba", ("<tool_calls>",), "guide", ("<tool_calls>", "</tool_calls>"), ("jamba",)),
    ToolFormat("apertus", "Apertus", ("<|tools_prefix|>",), "guide"),
    ToolFormat("longcat", "LongCat-Flash", ("<longcat_tool_call>",), "guide"),
    ToolFormat("dots", "dots", ("<dots_function_call>",), "dots_tool_parser.py"),
    ToolFormat("hermes", "Qwen2.5, QwQ, Qwen3, Hermes, SmolLM3", ("<tool_call>", "arguments"), "guide"),
)
# Mistral's own tokenizer needs no template and shows tools itself.
MISTRAL_TOKENIZER = "tekken.json"
FLAGS = ("--tool-call-parser", "--enable-auto-tool-choice")


def with_tool_calling(launches: Iterable[Launch], parsers: AbstractSet[str] = frozenset()) -> tuple[Launch, ...]:
    """Set the tool parser of each launch; `parsers` are those of the installed vLLM, if known.

    Flags for tools in the `args` of a replica are the operator's choice, and nothing is added to them.
    """
    return tuple(replace(each, tool_parser=_parser_of(each, parsers)) for each in launches)


def tool_format(template: ChatTemplate, model_type: str, tokens: Collection[str]) -> ToolFormat | None:
    """Return the tool call format of a template; None if it renders no tools or the format is unknown.

    `tokens` are those of the formats' tokens that the tokenizer has.
    """
    if template.text is None or not _shows_tools(template):
        return None
    for each in TOOL_FORMATS:
        if all(mark in template.text for mark in each.marks) and (model_type in (each.model_types or (model_type,))):
            return each if set(each.tokens) <= set(tokens) else None
    return None


def without_tools(launches: Iterable[Launch]) -> tuple[str, ...]:
    """Describe, by variant, the replicas for which `tool_calling: auto` has found no parser.

    `launches` are those that `with_tool_calling` returns. Clients with tools are refused there.
    """
    replicas: dict[str, list[str]] = {}
    for each in launches:
        if each.settings.tool_calling == "auto" and each.variant.path is not None and not takes_tools(each):
            replicas.setdefault(each.variant.name, []).append(each.replica_id)
    return tuple(
        f"{', '.join(names)}: tool_calling: auto found no tool parser in the chat template of {variant}; requests with "
        f"tools are refused. Set tool_calling to a tool parser of vLLM, or to off"
        for variant, names in replicas.items()
    )


def takes_tools(launch: Launch) -> bool:
    """Return whether the server of a launch parses tool calls."""
    return launch.tool_parser is not None or _in_args(launch.settings.args)


def _parser_of(launch: Launch, parsers: AbstractSet[str]) -> str | None:
    choice, path = launch.settings.tool_calling, launch.variant.path
    if choice == "off" or path is None or _in_args(launch.settings.args):
        return None
    if choice != "auto":
        return choice
    parser = _detected_parser(path, launch.settings.args)
    return parser if not parsers or parser in parsers else None


def _detected_parser(path: Path, args: Sequence[str]) -> str | None:
    if (path / MISTRAL_TOKENIZER).is_file():
        return "mistral"
    template = chosen_template(read_chat_template(path), option(args, "--chat-template"))
    tokens = {token for each in TOOL_FORMATS for token in each.tokens}
    detected = tool_format(template, _model_type(path), {token for token in tokens if has_tokens(path, token)})
    return detected.parser if detected else None


def _shows_tools(template: ChatTemplate) -> bool:
    assert template.text is not None
    if "tools" not in template.text:
        return False
    try:
        prompt = renderer(template.text, template.special_tokens)(PROBE, tools=[TOOL])
    except TemplateUnusable:
        return False
    return TOOL["function"]["name"] in prompt


def _model_type(path: Path) -> str:
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    return str(config.get("model_type", "")) if isinstance(config, dict) else ""


def _in_args(args: Sequence[str]) -> bool:
    return any(word.partition("=")[0].replace("_", "-") in FLAGS for word in args)
