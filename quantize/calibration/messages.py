"""One message of a chat, in the spellings of different tools -> a checked turn. Pure."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from quantize.calibration.records import Message, ToolCall

ROLES = ("assistant", "developer", "system", "tool", "user")
# Names of ShareGPT, LLaMA-Factory, ms-swift, Gemma and of OpenAI's first function calls.
ROLE_ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "human": "user",
        "gpt": "assistant",
        "chatgpt": "assistant",
        "model": "assistant",
        "function": "tool",
        "function_response": "tool",
        "observation": "tool",
        "tool_response": "tool",
    }
)
# A turn of its own whose content is the JSON of one call or of several (LLaMA-Factory, ms-swift).
CALL_ROLES = frozenset({"function_call", "tool_call"})
# Where servers and data sets put the reasoning when it is not in the content.
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_TEXT_PARTS = frozenset({"text", "input_text", "output_text"})
_THINKING_PARTS = frozenset({"thinking", "reasoning"})
_MEDIA_PARTS = frozenset(
    {"image", "image_url", "input_image", "video", "video_url", "audio", "audio_url", "input_audio"}
)
# Turns that may be empty: an empty system prompt replaces the template's own, a function may return nothing.
_MAY_BE_EMPTY = frozenset({"system", "developer", "tool"})


def turns_of(messages: Any, name: str) -> tuple[Message, ...] | str:
    """Check a list of messages; a string is the problem. `name` is the key that holds the list."""
    if not isinstance(messages, list) or not messages:
        return f"{name} is empty or no list"
    turns: list[Message] = []
    for position, message in enumerate(messages, 1):
        turn = _turn(message)
        if isinstance(turn, str):
            return f"message {position}: {turn}"
        if _is_call(message) and turns and turns[-1].role == "assistant":
            # Parallel calls, or calls after a text, are one turn in the API that templates are written for.
            turns[-1] = replace(turns[-1], tool_calls=(*turns[-1].tool_calls, *turn.tool_calls))
        else:
            turns.append(turn)
    return tuple(turns)


def tools_of(tools: Any) -> str | None:
    """Return the JSON text of a list of functions in OpenAI's form, "" for none, None for what is no such list."""
    if isinstance(tools, str) and tools.strip():
        tools = _json_or_none(tools)
        if tools is None:
            return None
    if not tools:
        return ""
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        return None
    wrapped = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    named = all(isinstance(tool["function"], dict) and tool["function"].get("name") for tool in wrapped)
    return json.dumps(wrapped, ensure_ascii=False) if named else None


def is_text(value: Any) -> bool:
    """Whether a value is a string with more than white space."""
    return isinstance(value, str) and bool(value.strip())


def has_media(message: Any) -> bool:
    """Whether a message holds an image, video or audio part, or the placeholder of an image."""
    content = _first(message, "content", "value") if isinstance(message, dict) else None
    if isinstance(content, list):
        return any(isinstance(part, dict) and part.get("type") in _MEDIA_PARTS for part in content)
    return isinstance(content, str) and "<image>" in content and role_of(message) == "user"


def role_of(message: Mapping[str, Any]) -> Any:
    """Return the role of a message by its usual name."""
    role = _first(message, "role", "from")
    return ROLE_ALIASES.get(role, role) if isinstance(role, str) else role


def _turn(message: Any) -> Message | str:
    if not isinstance(message, dict):
        return "is no object"
    role = role_of(message)
    content = _text(_first(message, "content", "value"))
    if _is_call(message):
        calls = _calls(_json_or_none(content) if isinstance(content, str) else None)
        return calls if isinstance(calls, str) else Message("assistant", "", calls)
    if role not in ROLES:
        return f"role {role!r} is none of {', '.join(ROLES)}"
    if role == "assistant":
        return _assistant_turn(message, content)
    if not is_text(content) and not (role in _MAY_BE_EMPTY and isinstance(content, str)):
        return '"content" is empty or no text'
    if role != "tool":
        return Message(role, content)
    call_id, name = (str(message.get(key) or "") for key in ("tool_call_id", "name"))
    return Message(role, content, (), call_id, name)


def _assistant_turn(message: Mapping[str, Any], content: Any) -> Message | str:
    calls = _calls(_listed_calls(message))
    if isinstance(calls, str):
        return calls
    content = _with_reasoning(message, content)
    if calls and content is None:
        content = ""
    if not isinstance(content, str) or not (content.strip() or calls):
        return '"content" is empty or no text'
    return Message("assistant", content, calls)


def _is_call(message: Any) -> bool:
    return isinstance(message, dict) and str(_first(message, "role", "from")) in CALL_ROLES


def _listed_calls(message: Mapping[str, Any]) -> Any:
    legacy = message.get("function_call")
    return message.get("tool_calls") or ([legacy] if legacy else [])


def _calls(calls: Any) -> tuple[ToolCall, ...] | str:
    """Check tool calls, `{"function": {"name", "arguments"}}` or the inner object alone; a string is the problem."""
    if isinstance(calls, dict):
        calls = [calls]
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        return "its tool calls are no list of objects"
    parsed = []
    for number, call in enumerate(calls, 1):
        function = call.get("function", call)
        if not isinstance(function, dict) or not is_text(function.get("name")):
            return f"tool call {number} names no function"
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            arguments = _json_or_none(arguments)
        if not isinstance(arguments, dict):
            return f'tool call {number}: "arguments" is no JSON object'
        encoded = json.dumps(arguments, ensure_ascii=False)
        parsed.append(ToolCall(function["name"], encoded, str(call.get("id") or "")))
    return tuple(parsed)


def _text(content: Any) -> Any:
    """Join the text parts of a content by line breaks, as vLLM does; what is no list of parts stays as it is."""
    if not isinstance(content, list) or not content:
        return content
    texts = [_part(part) for part in content]
    if not all(isinstance(text, str) for text in texts):
        return None
    reasoning = [text for part, text in zip(content, texts, strict=True) if _is_thinking(part)]
    answer = "\n".join(text for part, text in zip(content, texts, strict=True) if not _is_thinking(part))
    return with_reasoning("\n".join(reasoning), answer) if reasoning else answer


def _part(part: Any) -> Any:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        return None
    if _is_thinking(part):
        return _text(_first(part, "thinking", "reasoning", "text"))
    return part.get("text") if part.get("type", "text") in _TEXT_PARTS else None


def _is_thinking(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") in _THINKING_PARTS


def with_reasoning(reasoning: str, answer: str) -> str:
    """Put reasoning in front of an answer, in think tags."""
    return f"<think>\n{reasoning.strip()}\n</think>\n\n{answer}"


def _with_reasoning(message: Mapping[str, Any], content: Any) -> Any:
    apart = next((message[key] for key in REASONING_KEYS if is_text(message.get(key))), "")
    if not apart or not isinstance(content, str | None) or "</think>" in (content or ""):
        return content
    return with_reasoning(apart, content or "")


def _first(message: Mapping[str, Any], *keys: str) -> Any:
    """Return the value of the first of `keys` that is there and not null."""
    return next((message[key] for key in keys if message.get(key) is not None), None)


def _json_or_none(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def as_list(value: Any) -> Any:
    """Parse the JSON text of a list; anything else stays as it is."""
    parsed = _json_or_none(value) if isinstance(value, str) and value.lstrip().startswith("[") else None
    return parsed if isinstance(parsed, list) else value


def pairs_of(history: Any) -> Sequence[tuple[str, str]] | None:
    """Return earlier [question, answer] pairs, empty for none, None for what is no such list."""
    if not history:
        return ()
    if not isinstance(history, list):
        return None
    pairs = [tuple(pair) for pair in history if isinstance(pair, list) and len(pair) == 2 and all(map(is_text, pair))]
    return pairs if len(pairs) == len(history) else None
