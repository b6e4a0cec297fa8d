"""One line of calibration text: a chat, a prompt with its completion, or bare text; checked, and named by content."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_ROLES = ("assistant", "developer", "system", "tool", "user")
# Where servers and data sets put the reasoning when it is not in the content.
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_KINDS = 'a line is {"messages": [{"role": ..., "content": ...}]}, {"prompt": ..., "completion": ...} or {"text": ...}'


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Row:
    """One line of calibration text, where it was read, and the sha256 of what it says.

    It is a chat of `messages`; or `messages` that ask for the raw `completion`, which is `finished` unless a limit
    cut it; or bare `text`. `origin` names the row whose prompt the base answered itself; `source` names its file.
    """

    messages: tuple[Message, ...]
    where: str
    sha256: str
    text: str = ""
    completion: str = ""
    finished: bool = True
    origin: str = ""
    source: str = ""

    @property
    def generated(self) -> bool:
        """Whether the base wrote this row's answer itself."""
        return bool(self.origin)

    @property
    def words(self) -> str:
        """All that the row says, without roles."""
        return "\n".join(
            part for part in (*(turn.content for turn in self.messages), self.completion, self.text) if part
        )


def parse_line(line: str, where: str) -> Row | str:
    """Turn one line into a row, or into the problem it has."""
    try:
        value = json.loads(line)
    except ValueError as error:
        return f"{where}: not JSON: {error}"
    row = _row(value, where)
    if isinstance(row, Row):
        return row if _is_unicode(row) else f"{where}: holds half of a surrogate pair, which no tokenizer can read"
    return f"{where}: {row}"


def content_sha256(turns: Sequence[Message]) -> str:
    """Digest what turns say; a prompt with its completion says the same as the chat of both."""
    told = json.dumps([[turn.role, turn.content] for turn in turns], ensure_ascii=False)
    return hashlib.sha256(told.encode("utf-8", "surrogatepass")).hexdigest()


def prompt_of(row: Row) -> tuple[Message, ...]:
    """What the last answer of a row answers: its turns up to the last user turn; nothing for bare text."""
    users = [place for place, turn in enumerate(row.messages) if turn.role == "user"]
    return row.messages[: users[-1] + 1] if users else ()


def _row(value: Any, where: str) -> Row | str:
    if not isinstance(value, dict):
        return f"is no object; {_KINDS}"
    if "messages" in value:
        return _chat_row(value["messages"], where)
    if "completion" in value:
        return _completion_row(value, where)
    if "text" in value:
        return _text_row(value["text"], where)
    return f'has no "messages", "completion" or "text"; {_KINDS}'


def _chat_row(messages: Any, where: str) -> Row | str:
    turns = _turns(messages, '"messages"')
    return turns if isinstance(turns, str) else Row(turns, where, content_sha256(turns))


def _completion_row(value: dict[str, Any], where: str) -> Row | str:
    prompt, completion = value.get("prompt"), value["completion"]
    turns = _turns([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt, '"prompt"')
    if isinstance(turns, str):
        return turns
    if not _is_text(completion):
        return '"completion" is empty or no text'
    mark = value.get("self_generated", {"from": "", "finished": True})
    if not _is_mark(mark):
        return '"self_generated" is not {"from": sha256 of a row, "finished": true or false}'
    sha256 = content_sha256([*turns, Message("assistant", completion)])
    return Row(turns, where, sha256, completion=completion, finished=mark["finished"], origin=mark["from"])


def _text_row(text: Any, where: str) -> Row | str:
    if not _is_text(text):
        return '"text" is empty or no text'
    return Row((), where, content_sha256([Message("text", text)]), text=text)


def _turns(messages: Any, name: str) -> tuple[Message, ...] | str:
    if not isinstance(messages, list) or not messages:
        return f"{name} is empty or no list"
    turns = []
    for position, message in enumerate(messages, 1):
        turn = _turn(message)
        if isinstance(turn, str):
            return f"message {position}: {turn}"
        turns.append(turn)
    return tuple(turns)


def _turn(message: Any) -> Message | str:
    if not isinstance(message, dict):
        return "is no object"
    role, content = message.get("role"), message.get("content")
    if role not in _ROLES:
        return f"role {role!r} is none of {', '.join(_ROLES)}"
    if role == "assistant":
        content = _with_reasoning(message, content)
    if not isinstance(content, str) or not content.strip():
        return '"content" is empty or no text'
    return Message(role, content)


def _with_reasoning(message: dict[str, Any], content: Any) -> Any:
    apart = next((message[key] for key in _REASONING_KEYS if _is_text(message.get(key))), "")
    if not apart or not isinstance(content, str | None) or "</think>" in (content or ""):
        return content
    return f"<think>\n{apart.strip()}\n</think>\n\n{content or ''}"


def _is_mark(mark: Any) -> bool:
    return isinstance(mark, dict) and isinstance(mark.get("from"), str) and isinstance(mark.get("finished"), bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_unicode(row: Row) -> bool:
    try:
        row.words.encode()
    except UnicodeEncodeError:
        return False
    return True
