"""Checks on JSON text that msgspec does not report: duplicate keys, and nesting depth.

All texts have been accepted by msgspec before. Each check first tries a cheap proof that covers usual requests, then
computes the exact answer. Both take linear time, and neither builds Python objects of large values.
"""

import re
from collections.abc import Iterable, Mapping
from functools import cache
from itertools import accumulate
from typing import Any

import msgspec

Fields = dict[str, msgspec.Raw]
Parts = tuple[msgspec.Raw, ...]

_OBJECT = msgspec.json.Decoder(Fields)
_KEY = re.compile(rb'[\s,]*+"([^"\\]*+(?:\\.[^"\\]*+)*+)"\s*+:\s*+')
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"')
# Brackets as signed bytes: +1 opens a level, -1 closes it.
_BRACKET_STEPS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))

# The shortest duplicate entry is `,"":0`. An object of n entries has two braces, n-1 commas, and `"":` per entry.
_SHORTEST_DUPLICATE_BYTES = 5
_OBJECT_BYTES, _ENTRY_BYTES = 1, 4

# A text up to this size is cheap to copy or to scan as a whole.
SHORT_BYTES = 65536
# Length of the prefix that is scanned first. A value that is not longer is not worth splitting.
_PREFIX_BYTES = 4096
# Levels below the top that are split by the parser, which skips strings faster than a regex does. The text of a message
# is two levels down: in `messages`, at an index.
_SPLIT_LEVELS = 2
# An array with more parts is not split: the parts could take more memory than the text.
_MAX_PARTS = 4096


def duplicate_key(text: bytes, fields: Fields) -> str | None:
    """Return the first duplicate key of an object, or None.

    `text` is the object and `fields` what msgspec decoded from it, in which the last value of a duplicate key counts.
    """
    compact = _OBJECT_BYTES + _ENTRY_BYTES * len(fields) + sum(map(len, fields)) + sum(map(len, fields.values()))
    if len(text) - compact < _SHORTEST_DUPLICATE_BYTES:
        return None
    python_spaces = 2 * len(fields) - 1
    if len(text) - compact == python_spaces and len(text) <= SHORT_BYTES and text == _python_format(fields):
        return None
    return _compare_entries(text, fields)


def _python_format(fields: Fields) -> bytes:
    """Encode an object with the spaces of Python's `json.dumps`."""
    return b"{%b}" % b", ".join([b'"%b": %b' % (key.encode(), raw) for key, raw in fields.items()])


def _compare_entries(text: bytes, fields: Fields) -> str | None:
    """Compare the text with the decoded fields entry by entry; the first difference is a duplicate key."""
    at, name = text.index(b"{") + 1, ""
    for key, raw in fields.items():
        match = _KEY.match(text, at)
        if match is None:
            return name  # The last value only starts with the decoded one, as 12 starts with 1: its key is repeated.
        name = _decode_key(match[1])
        # A dict keeps the order of first appearance, so a different key is a repeated one. A different value means that
        # this key is repeated later.
        if name != key or not text.startswith(raw, match.end()):
            return name
        at = match.end() + len(raw)
    if text[at : at + 1] == b"}" or text[at:].strip() == b"}":
        return None
    match = _KEY.match(text, at)
    return name if match is None else _decode_key(match[1])


def _decode_key(escaped: bytes) -> str:
    return msgspec.json.decode(b'"%b"' % escaped, type=str) if b"\\" in escaped else escaped.decode()


def split_array(array: bytes, max_parts: int) -> Parts | None:
    """Split an array into its values; None if there are more than `max_parts`, which is noticed at the first excess."""
    try:
        values = msgspec.structs.astuple(_bounded_array_decoder(max_parts).decode(array))
    except msgspec.ValidationError:
        return None
    return tuple(value for value in values if value is not None)


@cache
def _bounded_array_decoder(max_parts: int) -> "msgspec.json.Decoder[Any]":
    """Make a decoder of arrays with at most `max_parts` values, as a struct of that many optional fields.

    A length constraint on a list is checked only after all of it was decoded, into several times the request's memory.
    """
    parts = [(f"part_{number}", msgspec.Raw, None) for number in range(max_parts)]
    return msgspec.json.Decoder(msgspec.defstruct("Parts", parts, array_like=True, forbid_unknown_fields=True))


def nests_deeper(text: bytes, fields: Fields, arrays: Mapping[str, Parts], levels: int) -> bool:
    """Whether an object nests deeper than `levels`; `arrays` are the fields that `split_array` has already split."""
    if len(text) <= SHORT_BYTES and _opens_at_most(text, levels):
        return False
    for key, raw in fields.items():
        if (parts := arrays.get(key)) is not None:
            deeper = _any_deeper(parts, levels - 2, _SPLIT_LEVELS - 1)
        else:
            deeper = _deeper(bytes(raw), levels - 1, _SPLIT_LEVELS)
        if deeper:
            return True
    return False


def _any_deeper(parts: Iterable[msgspec.Raw], levels: int, split_levels: int) -> bool:
    return any(_deeper(bytes(part), levels, split_levels) for part in parts)


def _deeper(text: bytes, levels: int, split_levels: int) -> bool:
    if text[0] not in b"[{" or _opens_at_most(text, levels):
        return False
    parts = _split(text) if split_levels and len(text) > _PREFIX_BYTES else None
    return _scan_deeper(text, levels) if parts is None else _any_deeper(parts, levels - 1, split_levels - 1)


def _opens_at_most(text: bytes, levels: int) -> bool:
    """Whether a text has at most `levels` opening brackets: then it cannot nest deeper, wherever they are."""
    prefix = text[:_PREFIX_BYTES]
    if prefix.count(b"[") + prefix.count(b"{") > levels:
        return False
    return len(text) <= _PREFIX_BYTES or text.count(b"[") + text.count(b"{") <= levels


def _split(text: bytes) -> Iterable[msgspec.Raw] | None:
    """Split an array or object into its values; None if there are too many, or if a duplicate key hides one."""
    try:
        if text.startswith(b"["):
            return split_array(text, _MAX_PARTS)
        fields = _OBJECT.decode(text)
    except RecursionError:
        return None
    return fields.values() if duplicate_key(text, fields) is None else None


def _scan_deeper(text: bytes, levels: int) -> bool:
    """Remove strings, keep only brackets, and add them up."""
    steps = _STRING.sub(b"", text).translate(_BRACKET_STEPS, _NOT_BRACKETS)
    return max(accumulate(memoryview(steps).cast("b"))) > levels
