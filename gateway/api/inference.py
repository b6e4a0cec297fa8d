"""Parse a request once: read the few keys that we decide on, keep the bytes of all others as they came."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from config.schema import NO_FLOOR, Floor, LimitSettings
from gateway.api.bounds import GUARDED_FIELDS, GUARDED_KWARGS, check_bounds, read
from gateway.api.endpoints import RESPONSES, Endpoint
from gateway.api.json_text import Fields, nests_deeper, repeated_key
from gateway.errors import NO_JSON, RequestError

PRECISION_HEADER = "x-quantgate-precision"
FLOOR_HEADER = "x-quantgate-floor"
# Ours, never the engine's: the key that OpenRouter's clients send to choose a precision.
PROVIDER = "provider"
# OpenAI's names for an answer that a later request finds again; with several replicas it would be at another one.
STATEFUL_KEYS = ("previous_response_id", "conversation", "background")

# vLLM's largest request model has about 60 fields.
MOST_KEYS = 256
LONGEST_MODEL = 256

_ENCODER = msgspec.json.Encoder()
_FIELDS = msgspec.json.Decoder(Fields)
_OBJECT = msgspec.json.Decoder(Fields | None)
_TEXT = msgspec.json.Decoder(str)
_FLAG = msgspec.json.Decoder(bool | None)
_INTEGER = msgspec.json.Decoder(int | None)
_ANY = msgspec.json.Decoder()
_TRUE, _FALSE = msgspec.Raw(b"true"), msgspec.Raw(b"false")
_RARE = GUARDED_FIELDS | {PROVIDER, "chat_template_kwargs"}


@dataclass(frozen=True, slots=True)
class Inference:
    """What a client asked for; `fields` holds what a replica gets of the body's top level, each value as its bytes."""

    endpoint: Endpoint
    model: str
    stream: bool
    # Whether a stream's usage is the client's to see.
    wants_usage: bool
    fields: Fields
    precisions: frozenset[str] | None = None
    floor: Floor = NO_FLOOR

    @property
    def wants_token_ids(self) -> bool:
        """Tell whether the client itself asks for token ids."""
        return bool(read(self.fields, "return_token_ids", _FLAG))

    def without_thinking(self) -> "Inference":
        """Turn thinking off, unless the client's own `chat_template_kwargs` say otherwise.

        `reasoning_effort` doesn't turn it on again: many clients send one whatever the model, and vLLM takes the kwarg.
        """
        given = _object(self.fields, "chat_template_kwargs") or {}
        kwargs = {"enable_thinking": _FALSE, **given}
        return replace(self, fields={**self.fields, "chat_template_kwargs": _raw(kwargs)})

    def body_for(self, served_name: str, *, token_ids: bool = False) -> bytes:
        """Write the body that a replica gets: its own model name, and usage always asked for."""
        fields = {**self.fields, "model": _raw(served_name)}
        if self.stream and not self.wants_usage:
            options = _object(self.fields, "stream_options") or {}
            fields["stream_options"] = _raw({**options, "include_usage": _TRUE})
        if token_ids:
            fields["return_token_ids"] = _TRUE
        return _ENCODER.encode(fields)


def parse_inference(
    endpoint: Endpoint,
    body: bytes,
    headers: Mapping[bytes, bytes],
    limits: LimitSettings,
    caller_may: frozenset[str] = frozenset(),
    max_tokens: int | None = None,
) -> Inference:
    """Read a request's body and headers; RequestError names the key at fault.

    `caller_may` names guarded fields that the caller may use, `max_tokens` is the longest answer that it may ask for.
    """
    _check_content_type(headers)
    fields = _read_fields(body, limits)
    model = _model(fields)
    check_bounds(endpoint, fields, body.count(b","), limits)
    stream = endpoint.generates and bool(read(fields, "stream", _FLAG))
    wants_usage = not (endpoint.takes_stream_options and stream) or _wants_usage(fields)
    precisions = _precisions(fields, headers.get(PRECISION_HEADER.encode()))
    fields = _permitted(fields, caller_may)
    if endpoint is RESPONSES:
        fields = _stateless(fields)
    if max_tokens is not None:
        fields = _bounded_length(endpoint, fields, max_tokens)
    floor = headers.get(FLOOR_HEADER.encode())
    return Inference(
        endpoint, model, stream, wants_usage, fields, precisions, _floor(floor.decode("latin-1")) if floor else NO_FLOOR
    )


def _check_content_type(headers: Mapping[bytes, bytes]) -> None:
    given = headers.get(b"content-type", b"")
    if given == b"application/json":
        return
    kind = given.decode("latin-1").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError(f"content-type is {kind[:100] or 'missing'!r}; send application/json")


def _read_fields(body: bytes, limits: LimitSettings) -> Fields:
    """The body's top level, checked for what could make others read it differently."""
    try:
        fields = _FIELDS.decode(body)
        if not body.isascii():
            # A value that is kept as bytes has not been decoded yet.
            body.decode()
    except NO_JSON as error:
        raise RequestError(_no_json(body, error), code="invalid_json") from error
    if len(fields) > MOST_KEYS:
        raise RequestError(f"the body has {len(fields)} keys, the limit is {MOST_KEYS}")
    if (name := repeated_key(body, fields)) is not None:
        raise RequestError(f"{_shown(name)} comes twice; send it once", param=_shown(name), code="duplicate_key")
    if nests_deeper(body, limits.depth):
        raise RequestError(f"the body nests deeper than {limits.depth} levels", code="invalid_json")
    return fields


def _no_json(body: bytes, error: Exception) -> str:
    if not body.strip():
        return "the body is empty; send a JSON object"
    if body.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        return "the body begins with a byte order mark; send plain UTF-8"
    return f"the body is no JSON object: {error}"


def _model(fields: Fields) -> str:
    model = read(fields, "model", _TEXT)
    if not model:
        raise RequestError("'model' is missing; GET /v1/models lists the names", param="model")
    if len(model) > LONGEST_MODEL or not model.isprintable():
        raise RequestError(f"'model' is no name: {_shown(model)}; GET /v1/models lists the names", param="model")
    return model


def _wants_usage(fields: Fields) -> bool:
    options = _object(fields, "stream_options")
    return bool(options and _inner(options, "stream_options", "include_usage", _FLAG))


def _permitted(fields: Fields, caller_may: frozenset[str]) -> Fields:
    """Leave out what is ours, and what of the engine's the caller may not use."""
    rare = fields.keys() & _RARE
    if not rare:
        return fields
    kept = {key: raw for key, raw in fields.items() if key not in rare or key in caller_may}
    kept.pop(PROVIDER, None)
    kwargs = _object(fields, "chat_template_kwargs")
    if kwargs is None:
        return kept
    left = {key: raw for key, raw in kwargs.items() if key not in GUARDED_KWARGS or key in caller_may}
    as_given = fields["chat_template_kwargs"]
    return {**kept, "chat_template_kwargs": as_given if len(left) == len(kwargs) else _raw(left)}


def _stateless(fields: Fields) -> Fields:
    """Have an answer kept nowhere, and refuse to go on from one that was."""
    for key in STATEFUL_KEYS:
        if read(fields, key, _ANY):
            raise RequestError(
                f"{key!r} is not supported: answers are kept nowhere; send the whole conversation as 'input'",
                param=key,
                code="unsupported",
            )
    return {**fields, "store": _FALSE}


def _bounded_length(endpoint: Endpoint, fields: Fields, max_tokens: int) -> Fields:
    """Refuse a longer answer than the caller may ask for, and ask for that length where none is given."""
    given = [(key, length) for key in endpoint.length_keys if (length := read(fields, key, _INTEGER)) is not None]
    for key, length in given:
        if length > max_tokens:
            raise RequestError(f"{key!r} is {length}, the limit of this API key is {max_tokens}", param=key)
    default = endpoint.length_default_tokens
    if given or not endpoint.length_keys or (default is not None and default <= max_tokens):
        return fields
    return {**fields, endpoint.length_keys[0]: _raw(max_tokens)}


def _precisions(fields: Fields, header: bytes | None) -> frozenset[str] | None:
    """The precisions that the caller accepts; the header and the body's `provider` must both agree."""
    asked = []
    provider = _object(fields, PROVIDER) if PROVIDER in fields else None
    if provider:
        named = _inner(provider, PROVIDER, "quantizations", _ANY)
        if named is not None and not (isinstance(named, list) and all(isinstance(item, str) for item in named)):
            param = "provider.quantizations"
            raise RequestError(f"{param!r} is no list of names such as int8", param=param)
        asked += [frozenset(named)] if named else []
    if header:
        parts = header.decode("latin-1").split(",")
        asked.append(frozenset(filter(None, (part.strip() for part in parts))))
    return frozenset.intersection(*asked) if asked else None


def _floor(header: str) -> Floor:
    limits: dict[str, float] = {}
    for part in filter(None, header.split(",")):
        measure, _, value = part.partition("=")
        if measure.strip() not in Floor.model_fields:
            known = ", ".join(Floor.model_fields)
            raise RequestError(
                f"{FLOOR_HEADER}: {_shown(measure.strip())} is no measure; known: {known}", param=FLOOR_HEADER
            )
        try:
            limits[measure.strip()] = float(value)
        except ValueError:
            raise RequestError(f"{FLOOR_HEADER}: {_shown(part.strip())} has no number", param=FLOOR_HEADER) from None
    try:
        return Floor.model_validate(limits)
    except ValueError as error:
        raise RequestError(f"{FLOOR_HEADER}: {_shown(header)} is out of range", param=FLOOR_HEADER) from error


def _object(fields: Fields, key: str) -> Fields | None:
    """An object that we read ourselves; the engine must read the same in it."""
    inner = read(fields, key, _OBJECT)
    if inner and (name := repeated_key(bytes(fields[key]), inner)) is not None:
        param = f"{key}.{name[:100]}"
        raise RequestError(f"{param!r} comes twice; send it once", param=param, code="duplicate_key")
    return inner


def _inner(fields: Fields, outer: str, key: str, decoder: "msgspec.json.Decoder[Any]") -> Any:
    try:
        return read(fields, key, decoder)
    except RequestError as error:
        param = f"{outer}.{key}"
        raise RequestError(f"{param!r}: {error.__cause__}", param=param) from error


def _raw(value: Any) -> msgspec.Raw:
    return msgspec.Raw(_ENCODER.encode(value))


def _shown(text: str) -> str:
    return repr(text[:100])
