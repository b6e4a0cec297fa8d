"""Reads single fields of a request body; every RequestError names the field in `param`."""

from typing import Generic, Protocol, TypeVar

import msgspec
from pydantic import TypeAdapter

from gateway.errors import INVALID_JSON, RequestError
from gateway.openai.json_scan import Fields, duplicate_key

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Decoder(Protocol[T_co]):
    """Decodes one JSON value."""

    def decode(self, raw: msgspec.Raw | bytes, /) -> T_co:
        """Return the value; raises one of INVALID_JSON."""


class EngineDecoder(Generic[T]):
    """Decodes a value as vLLM's request models do, which take `1.0` and `"1"` for 1, and `"true"` and 1 for true.

    Only what is not of the type itself is left to pydantic, which those models are made of.
    """

    def __init__(self, of_type: type[T]) -> None:
        self._strict = msgspec.json.Decoder(of_type)
        self._lax = TypeAdapter(of_type)

    def decode(self, raw: msgspec.Raw | bytes, /) -> T:
        """Return the value; raises msgspec.ValidationError if vLLM would refuse it."""
        try:
            return self._strict.decode(raw)
        except msgspec.ValidationError:
            try:
                return self._lax.validate_json(bytes(raw))
            except ValueError:
                pass  # the first message is the clearer one
            raise


_OBJECT = msgspec.json.Decoder(Fields | None)
FLAG: EngineDecoder[bool | None] = EngineDecoder(bool | None)  # type: ignore[arg-type]
INTEGER: EngineDecoder[int | None] = EngineDecoder(int | None)  # type: ignore[arg-type]
INTEGER_OR_FLAG: EngineDecoder[int | bool | None] = EngineDecoder(int | bool | None)  # type: ignore[arg-type]


def read(fields: Fields, key: str, decoder: Decoder[T]) -> T | None:
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
