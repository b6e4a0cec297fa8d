"""Tools as a provider gets them: the client's own functions.

Tools that a provider runs itself (web search, file search, MCP) read with the operator's credentials, or cost what
nothing here counts. Only known keys are copied: litellm takes some others for such tools.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from gateway.openai.external_shapes import objects, refused, require_object, require_text
from gateway.openai.fields import quoted

Fields = Mapping[str, Any]

# The kinds of tools that a client runs, and what of them a provider gets.
_KEYS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"function": ("description", "parameters", "strict"), "custom": ("description", "format")}
)
CLIENT_KINDS = frozenset(_KEYS)
_CHOICES = ("none", "auto", "required")


def client_tools(tools: Any, *, nested: bool) -> list[dict[str, Any]]:
    """Check and copy `tools`; RequestError for one that the provider runs. `nested`: in the form of chats."""
    copies = []
    for place, tool in enumerate(objects(tools, "tools")):
        where = f"tools[{place}]"
        kind = _client_kind(tool, where)
        inner = require_object(tool.get(kind), f"{where}.{kind}") if nested else tool
        named = _named(inner, _KEYS[kind], f"{where}.{kind}" if nested else where)
        copies.append({"type": kind, kind: named} if nested else {"type": kind, **named})
    return copies


def client_tool_choice(choice: Any, *, nested: bool) -> Any:
    """Check and copy `tool_choice`: a word, or one of the client's tools."""
    if isinstance(choice, str):
        if choice not in _CHOICES:
            raise refused("tool_choice", f"it is {quoted(choice)}", f"send {', '.join(_CHOICES)} or a tool")
        return choice
    tool = require_object(choice, "tool_choice")
    kind = _client_kind(tool, "tool_choice")
    inner = require_object(tool.get(kind), f"tool_choice.{kind}") if nested else tool
    named = _named(inner, (), "tool_choice")
    return {"type": kind, kind: named} if nested else {"type": kind, **named}


def client_functions(functions: Any) -> list[dict[str, Any]]:
    """Check and copy `functions`, the older form of `tools`."""
    entries = enumerate(objects(functions, "functions"))
    return [_named(entry, ("description", "parameters"), f"functions[{place}]") for place, entry in entries]


def client_function_call(call: Any) -> Any:
    """Check and copy `function_call`, the older form of `tool_choice`."""
    return (
        call
        if isinstance(call, str) and call in _CHOICES
        else _named(require_object(call, "function_call"), (), "function_call")
    )


def _client_kind(tool: Fields, where: str) -> str:
    kind = tool.get("type")
    if not isinstance(kind, str) or kind not in _KEYS:
        raise refused(where, f"the tool has the type {quoted(str(kind))}", f"send tools of type {' or '.join(_KEYS)}")
    return kind


def _named(tool: Fields, keys: tuple[str, ...], where: str) -> dict[str, Any]:
    name = require_text(tool.get("name"), f"{where}.name")
    return {"name": name, **{key: tool[key] for key in keys if tool.get(key) is not None}}
