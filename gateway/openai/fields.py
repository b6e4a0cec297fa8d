"""Fields of a request that are read, one at a time; each error names the key at fault."""

from typing import TypeVar

import msgspec

from gateway.errors import NO_JSON, RequestError
from gateway.openai.json_scan import Fields, duplicate_key

T = TypeVar("T")

_OBJECT = msgspec.json.Decoder(Fields | None)


def read(fields: Fields, key: str, decoder: "msgspec.json.Decoder[T]") -> T | None:
    """One field's value, None if it isn't there; RequestError names it."""
    raw = fields.get(key)
    if raw is None:
        return None
    try:
        return decoder.decode(raw)
    except NO_JSON as error:
        raise RequestError(f"{key!r}: {error}", param=key) from error


def read_object(fields: Fields, key: str) -> Fields | None:
    """An object that we read ourselves; the engine must read the same in it."""
    inner = read(fields, key, _OBJECT)
    if inner and (name := duplicate_key(bytes(fields[key]), inner)) is not None:
        raise duplicate_field(f"{key}.{name[:100]}")
    return inner


def duplicate_field(key: str) -> RequestError:
    return RequestError(f"{key!r} comes twice; send it once", param=key, code="duplicate_key")


def quoted(text: str) -> str:
    return repr(text[:100])
