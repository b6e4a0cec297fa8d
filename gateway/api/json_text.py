"""Facts about JSON text that a parser keeps to itself: keys that come twice, and how deeply it nests.

Every text here has been accepted by msgspec already. Each question has a cheap proof for what clients really send,
and an exact answer for the rest; both take linear time, and neither makes objects of large values.
"""

import re
from collections.abc import Iterable

import msgspec

Fields = dict[str, msgspec.Raw]

_OBJECT = msgspec.json.Decoder(Fields)
_ARRAY = msgspec.json.Decoder(list[msgspec.Raw])
_KEY = re.compile(rb'[\s{,]*+"([^"\\]*+(?:\\.[^"\\]*+)*+)"\s*+:\s*+')
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"')
_TO_SQUARE = bytes.maketrans(b"{}", b"[]")
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))

# The least that a second entry adds, `,"":0`, and what an object has anyway: braces and, a key, `"":,`.
_LEAST_ENTRY_BYTES = 5
_FRAME_BYTES, _ENTRY_BYTES = 1, 4

# So much is looked at before all of a large value is.
_GLANCE_BYTES = 4096
# So many layers are taken off by the parser, which passes over strings faster than a pattern does. A message's text
# is three layers down: the body, its messages, the message.
_LAYERS = 3
# What has shorter parts than this isn't taken apart: they would need more memory than the text.
_PART_BYTES = 64


def repeated_key(text: bytes, fields: Fields) -> str | None:
    """Name the first key that comes again in an object; `fields` is what msgspec made of its text (the last counts)."""
    unaccounted = len(text) - _FRAME_BYTES - _ENTRY_BYTES * len(fields) - sum(map(len, fields))
    if unaccounted - sum(map(len, fields.values())) < _LEAST_ENTRY_BYTES:
        return None
    return _walked(text, fields)


def _walked(text: bytes, fields: Fields) -> str | None:
    """Go through the text with what was read: where they part, a key has come again."""
    at, name = 0, ""
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


def nests_deeper(text: bytes, levels: int) -> bool:
    """Tell whether arrays and objects nest deeper than so many levels."""
    return _deeper(text, levels, _LAYERS)


def _deeper(text: bytes, levels: int, layers: int) -> bool:
    if text[0] not in b"[{ \t\r\n" or _opens_at_most(text, levels):
        return False
    parts = _parts(text) if layers else None
    if parts is None:
        return _scanned_deeper(text, levels)
    return any(_deeper(bytes(part), levels - 1, layers - 1) for part in parts)


def _opens_at_most(text: bytes, levels: int) -> bool:
    if text.count(b"[", 0, _GLANCE_BYTES) + text.count(b"{", 0, _GLANCE_BYTES) > levels:
        return False
    return text.count(b"[") + text.count(b"{") <= levels


def _parts(text: bytes) -> Iterable[msgspec.Raw] | None:
    """Values in an array or object; None if there are too many, or if a key hides one."""
    if text.count(b",") * _PART_BYTES > len(text):
        return None
    if text.lstrip().startswith(b"["):
        return _ARRAY.decode(text)
    fields = _OBJECT.decode(text)
    return fields.values() if repeated_key(text, fields) is None else None


def _scanned_deeper(text: bytes, levels: int) -> bool:
    """Take strings out, then the innermost brackets, level by level."""
    brackets = _STRING.sub(b"", text).translate(_TO_SQUARE, _NOT_BRACKETS)
    for _ in range(levels):
        if not brackets:
            return False
        brackets = brackets.replace(b"[]", b"")
    return bool(brackets)
