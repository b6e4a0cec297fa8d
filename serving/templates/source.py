"""What a model directory says about its chat template and its think tokens."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

THINK, END_THINK = "<think>", "</think>"
VOCABULARY_FILES = ("tokenizer.json", "tokenizer_config.json", "added_tokens.json", "vocab.json")
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A model's own template (None: it has none), the tokens that it may name, and whether the tokenizer thinks."""

    text: str | None
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    think_tokens: bool = False

    @property
    def mentions_thinking(self) -> bool:
        """Whether it mentions thinking at all; most templates do not."""
        text = self.text or ""
        return any(word in text for word in (THINK, END_THINK, "enable_thinking"))


def read_chat_template(directory: Path) -> ChatTemplate:
    """Read what transformers would take: `chat_template.jinja`, else the default one in `tokenizer_config.json`."""
    config = _json(directory / "tokenizer_config.json")
    beside = _text(directory / "chat_template.jinja")
    text = beside if beside is not None else _default(config.get("chat_template"))
    return ChatTemplate(text, _special_tokens(config), has_tokens(directory, THINK, END_THINK))


def chosen_template(own: ChatTemplate, chosen: str | None) -> ChatTemplate:
    """Give what vLLM renders with `--chat-template CHOSEN` in place of a model's own template; None: the own one."""
    return own if chosen is None else replace(own, text=_chosen_text(chosen))


def has_tokens(directory: Path, *tokens: str) -> bool:
    """Return whether the tokenizer has each of these words as one token.

    As bytes: in these files a JSON string that is exactly such a word is a token, and parsing 10 MB says no more.
    """
    files = [path.read_bytes() for name in VOCABULARY_FILES if (path := directory / name).is_file()]
    return all(any(json.dumps(token).encode() in content for content in files) for token in tokens)


def _chosen_text(chosen: str) -> str | None:
    """What `--chat-template` means: text if it looks like a template, otherwise a file; vLLM knows some names, too."""
    return chosen if any(mark in chosen for mark in "{}\n") else _text(Path(chosen))


def _default(named: Any) -> str | None:
    """A template, or the one called `default` of several with names."""
    if isinstance(named, list):
        known = {each["name"]: each["template"] for each in named if isinstance(each, dict)}
        named = known.get("default")
    return named if isinstance(named, str) else None


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Tokens by role; older files keep each as an object with its text in `content`."""
    tokens = {name: config.get(name) for name in SPECIAL_TOKENS}
    texts = {name: token.get("content") if isinstance(token, dict) else token for name, token in tokens.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def _json(path: Path) -> dict[str, Any]:
    try:
        read = json.loads(_text(path) or "{}")
    except ValueError:
        return {}
    return read if isinstance(read, dict) else {}
