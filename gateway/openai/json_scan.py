"""Facts about JSON text that a parser keeps to itself: keys that come twice, and how deeply it nests.

Every text here has been accepted by msgspec already. Each question has a cheap proof for what clients really send,
and an exact answer for the rest; both take linear time, and neither makes objects of large values.
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
# A level down, or up again, as a signed byte.
_STEPS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))

# The least that a second entry adds, `,"":0`, and what an object has anyway: braces and, a key, `"":,`.
_LEAST_ENTRY_BYTES = 5
_FRAME_BYTES, _ENTRY_BYTES = 1, 4

# What isn't longer is copied, or looked through, without a second thought.
SHORT_BYTES = 65536
# So much is looked at before all of a large value is; what is not longer isn't worth taking apart.
_GLANCE_BYTES = 4096
# So many layers below the top are taken off by the parser, which passes over strings faster than a pattern does:
# a message's text is behind `messages`, its place there and its key.
_LAYERS = 2
# An array with more parts isn't taken apart: they could need more memory than the text.
_MOST_PARTS = 4096


def duplicate_key(text: bytes, fields: Fields) -> str | None:
    """Name the first key that comes again in an object; `fields` is what msgspec made of its text (the last counts)."""
    least = _FRAME_BYTES + _ENTRY_BYTES * len(fields) + sum(map(len, fields)) + sum(map(len, fields.values()))
    if len(text) - least < _LEAST_ENTRY_BYTES:
        return None
    spaces = 2 * len(fields) - 1
    if len(text) - least == spaces and len(text) <= SHORT_BYTES and text == _as_python_writes(fields):
        return None
    return _walked(text, fields)


def _as_python_writes(fields: Fields) -> bytes:
    return b"{%b}" % b", ".join([b'"%b": %b' % (key.encode(), raw) for key, raw in fields.items()])


def _walked(text: bytes, fields: Fields) -> str | None:
    """Go through the text with what was read: where they part, a key has come again."""
    at, name = text.index(b"{") + 1, ""
    for key, raw in fields.items():
        found = _KEY.match(text, at)
        if found is None:
            return name  # its value began like the one that counts: 12 and 1
        name = _name(found[1])
        # First ones come in order, so another key is here for the second time; another value's key will be.
        if name != key or not text.startswith(raw, found.end()):
            return name
        at = found.end() + len(raw)
    if text[at : at + 1] == b"}" or text[at:].strip() == b"}":
        return None
    found = _KEY.match(text, at)
    return name if found is None else _name(found[1])


def _name(written: bytes) -> str:
    return msgspec.json.decode(b'"%b"' % written, type=str) if b"\\" in written else written.decode()


def split_array(array: bytes, most: int) -> Parts | None:
    """Take an array apart; None if it has more parts than that, which is found out at the first that is too many."""
    try:
        return tuple(part for part in msgspec.structs.astuple(_at_most(most).decode(array)) if part is not None)
    except msgspec.ValidationError:
        return None


@cache
def _at_most(most: int) -> "msgspec.json.Decoder[Any]":
    """Make a decoder of arrays with at most so many parts.

    The length of a list is checked when all of it has been read, which takes several times the memory of the request.
    """
    parts = [(f"part_{number}", msgspec.Raw, None) for number in range(most)]
    return msgspec.json.Decoder(msgspec.defstruct("Parts", parts, array_like=True, forbid_unknown_fields=True))


def nests_deeper(text: bytes, fields: Fields, arrays: Mapping[str, Parts], levels: int) -> bool:
    """Tell whether an object nests deeper than so many levels; `arrays` are fields that have been taken apart."""
    if len(text) <= SHORT_BYTES and _opens_at_most(text, levels):
        return False
    for key, raw in fields.items():
        if (parts := arrays.get(key)) is not None:
            deeper = _any_deeper(parts, levels - 2, _LAYERS - 1)
        else:
            deeper = _deeper(bytes(raw), levels - 1, _LAYERS)
        if deeper:
            return True
    return False


def _any_deeper(parts: Iterable[msgspec.Raw], levels: int, layers: int) -> bool:
    return any(_deeper(bytes(part), levels, layers) for part in parts)


def _deeper(text: bytes, levels: int, layers: int) -> bool:
    if text[0] not in b"[{" or _opens_at_most(text, levels):
        return False
    parts = _taken_apart(text) if layers and len(text) > _GLANCE_BYTES else None
    return _scanned_deeper(text, levels) if parts is None else _any_deeper(parts, levels - 1, layers - 1)


def _opens_at_most(text: bytes, levels: int) -> bool:
    begins = text[:_GLANCE_BYTES]
    if begins.count(b"[") + begins.count(b"{") > levels:
        return False
    return len(text) <= _GLANCE_BYTES or text.count(b"[") + text.count(b"{") <= levels


def _taken_apart(text: bytes) -> Iterable[msgspec.Raw] | None:
    """Values in an array or object; None if there are too many, or if a key hides one."""
    try:
        if text.startswith(b"["):
            return split_array(text, _MOST_PARTS)
        fields = _OBJECT.decode(text)
    except RecursionError:
        return None
    return fields.values() if duplicate_key(text, fields) is None else None


def _scanned_deeper(text: bytes, levels: int) -> bool:
    """Leave nothing but the brackets outside of strings, and count."""
    steps = _STRING.sub(b"", text).translate(_STEPS, _NOT_BRACKETS)
    return max(accumulate(memoryview(steps).cast("b"))) > levels
