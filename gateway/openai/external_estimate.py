"""How many tokens a request to a provider has, about, before its answer says so; pure."""

from collections.abc import Mapping
from typing import Any

BYTES_PER_TOKEN = 4
# Of an image, an audio or a file: their base64 is no text.
MEDIA_TOKENS = 1500
MEDIA_TYPES = frozenset({"image_url", "input_image", "input_audio", "file", "input_file"})
# While nothing says how far an answer is: reasoning that a provider does not show arrives at its end.
TOKENS_PER_SECOND = 50

_PROMPT = ("messages", "input", "instructions", "prompt", "suffix", "tools", "functions")
_LENGTHS = ("max_completion_tokens", "max_tokens", "max_output_tokens")
_CHOICES = ("n", "best_of")


def prompt_tokens(fields: Mapping[str, Any]) -> int:
    """Estimate the prompt in the fields that a provider gets."""
    text_bytes, other = _count([fields[name] for name in _PROMPT if name in fields])
    return text_bytes // BYTES_PER_TOKEN + other


def answer_tokens_limit(fields: Mapping[str, Any]) -> int | None:
    """Return how long all choices of an answer may be; None if the request does not say."""
    length = next((fields[name] for name in _LENGTHS if _is_count(fields.get(name))), None)
    choices = max([fields[name] for name in _CHOICES if _is_count(fields.get(name))], default=1)
    return None if length is None else length * choices


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _count(value: Any) -> tuple[int, int]:
    """Bytes of text, and tokens besides."""
    if isinstance(value, str):
        return len(value.encode("utf-8", "replace")), 0
    if isinstance(value, int):
        return 0, 1  # a token id, or a number in a schema
    if isinstance(value, list):
        return _sum(value)
    if not isinstance(value, dict):
        return 0, 0
    kind = value.get("type")
    if isinstance(kind, str) and kind in MEDIA_TYPES:
        return 0, MEDIA_TOKENS
    return _sum([*value, *value.values()])


def _sum(values: list[Any]) -> tuple[int, int]:
    counts = [_count(value) for value in values]
    return sum([text_bytes for text_bytes, _ in counts]), sum([tokens for _, tokens in counts])
