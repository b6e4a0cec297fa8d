"""Reads single fields of a request body; every RequestError names the field in `param`."""

from typing import TypeVar

import msgspec

from gateway.errors import INVALID_JSON, RequestError
from gateway.openai.json_scan import Fields, duplicate_key

T = TypeVar("T")

_OBJECT = msgspec.json.Decoder(Fields | None)


def read(fields: Fields, key: str, decoder: "msgspec.json.Decoder[T]") -> T | None:
    """Decode one field; None if it is absent, RequestError if it has another type."""
    raw = fields.get(key)
    if raw is None:
        return None
    try:
        return decoder.decode(raw)
    except INVALID_JSON as error:
        raise RequestError(f"{key!r}: {error}", param=key) from error


def read_object(fields: Fields, key: str) -> Fields | None:
    """Decode one level of a field's object; RequestError for duplicate keys: the engine could pick the other value."""
    inner = read(fields, key, _OBJECT)
    if inner and (name := duplicate_key(bytes(fields[key]), inner)) is not None:
        raise duplicate_field(f"{key}.{name[:100]}")
    return inner


def duplicate_field(key: str) -> RequestError:
    """400: a key occurs more than once in its object."""
    return RequestError(f"duplicate key {key!r}; send it once", param=key, code="duplicate_key")


def quoted(text: str) -> str:
    """Quote a client's text for an error message, truncated to 100 characters."""
    return repr(text[:100])
