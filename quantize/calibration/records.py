"""Calibration rows as values: a chat, a prompt with its completion, or bare text, named by content."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function call of an assistant turn; `arguments` is the JSON text of an object."""

    name: str
    arguments: str = "{}"
    id: str = ""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat.

    `tool_calls` belong to assistant turns, `tool_call_id` and `name` (the function's) to tool turns.
    """

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    name: str = ""

    def to_request(self) -> dict[str, Any]:
        """Convert to a message of the chat completions API; empty fields are omitted."""
        calls = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in self.tool_calls
        ]
        return {"role": self.role, "content": self.content, **self._extras(calls)}

    def to_template(self) -> dict[str, Any]:
        """Convert to what chat templates expect: arguments are objects (transformers and vLLM parse them, too)."""
        calls = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": json.loads(call.arguments)},
            }
            for call in self.tool_calls
        ]
        return {"role": self.role, "content": self.content, **self._extras(calls)}

    @classmethod
    def from_dict(cls, payload: Mapping[str, Any]) -> "Message":
        """Restore what `dataclasses.asdict` made of a message, or a plain `{role, content}`."""
        calls = tuple(ToolCall(**call) for call in payload.get("tool_calls", ()))
        return cls(**{**payload, "tool_calls": calls})

    def _extras(self, calls: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        extras = {"tool_calls": list(calls), "tool_call_id": self.tool_call_id, "name": self.name}
        return {key: value for key, value in extras.items() if value}


@dataclass(frozen=True, slots=True)
class Record:
    """One row of a calibration file, where it was read, and the sha256 of its contents.

    It is a chat of `messages`; or `messages` that ask for the raw `completion`, which is `finished` unless a limit
    cut it; or bare `text`. `tools` is the JSON text of the functions that the chat offers. `origin` is the sha256 of
    the row whose prompt the base answered itself; `source` that of the file; `format` names the row's format.
    `split_key` is the digest that decides between calibration and evaluation: rows with the same prompt share it.
    """

    messages: tuple[Message, ...]
    where: str
    sha256: str
    text: str = ""
    completion: str = ""
    finished: bool = True
    origin: str = ""
    source: str = ""
    tools: str = ""
    format: str = field(default="", compare=False)
    split_key: str = field(default="", compare=False)

    @property
    def generated(self) -> bool:
        """Whether the base wrote this row's answer itself."""
        return bool(self.origin)

    @property
    def words(self) -> str:
        """All that the row says, without roles."""
        turns = (
            part for turn in self.messages for part in (turn.content, *(call.arguments for call in turn.tool_calls))
        )
        return "\n".join(part for part in (*turns, self.completion, self.text) if part)

    @property
    def uses_tools(self) -> bool:
        """Whether the row offers, calls or answers functions."""
        return bool(self.tools) or any(turn.tool_calls or turn.tool_call_id or turn.name for turn in self.messages)

    @classmethod
    def from_dict(cls, payload: Mapping[str, Any]) -> "Record":
        """Restore what `dataclasses.asdict` made of a row."""
        return cls(**{**payload, "messages": tuple(map(Message.from_dict, payload["messages"]))})


def content_sha256(turns: Sequence[Message], tools: str = "") -> str:
    """Digest turns and tools; a prompt with its completion has the digest of the chat of both."""
    contents: list[list[Any]] = [["tools", tools]] if tools else []
    for turn in turns:
        extras = {key: value for key, value in turn.to_request().items() if key not in ("role", "content")}
        contents.append([turn.role, turn.content, extras] if extras else [turn.role, turn.content])
    encoded = json.dumps(contents, ensure_ascii=False)
    return hashlib.sha256(encoded.encode("utf-8", "surrogatepass")).hexdigest()


def prompt_of(record: Record) -> tuple[Message, ...]:
    """Return the turns up to the last user turn, which the row's last answer answers; nothing for bare text."""
    users = [place for place, turn in enumerate(record.messages) if turn.role == "user"]
    return record.messages[: users[-1] + 1] if users else ()
