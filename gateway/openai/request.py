"""Parse a request once: read the few keys that we decide on, keep the bytes of all others as they came."""

from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import structs

from config.schema import NO_FLOOR, Floor, LimitSettings
from gateway.errors import NO_JSON, RequestError
from gateway.openai.constraints import PROVIDER, parse_floor, parse_precisions
from gateway.openai.endpoints import Endpoint
from gateway.openai.fields import duplicate_field, quoted, read, read_object
from gateway.openai.json_scan import Fields, duplicate_key, nests_deeper
from gateway.openai.limits import GUARDED_FIELDS, GUARDED_KWARGS, check_limits, format_number

# What goes on from an answer that was kept: vLLM keeps it in one process, if at all.
EARLIER_KEYS = ("previous_response_id", "conversation")

# vLLM's largest request model has about 60 fields.
MOST_KEYS = 256
LONGEST_MODEL = 256

_ENCODER = msgspec.json.Encoder()
_FIELDS = msgspec.json.Decoder(Fields)
_TEXT = msgspec.json.Decoder(str)
_FLAG = msgspec.json.Decoder(bool | None)
_INTEGER = msgspec.json.Decoder(int | None)
_TRUE, _FALSE = msgspec.Raw(b"true"), msgspec.Raw(b"false")
_RARE = GUARDED_FIELDS | {PROVIDER, "chat_template_kwargs"}


class InferenceRequest(msgspec.Struct, frozen=True):
    """What a client asked for; `fields` holds what a replica gets of the body's top level, each value as its bytes."""

    endpoint: Endpoint
    model: str
    stream: bool
    # Whether a stream's usage is the client's to see.
    wants_usage: bool
    fields: Fields
    precisions: frozenset[str] | None = None
    floor: Floor = NO_FLOOR
    # How long an answer its API key allows, where the client names no length itself.
    fill_max_tokens: int | None = None

    @property
    def wants_token_ids(self) -> bool:
        """Tell whether the client itself asks for token ids."""
        return bool(read(self.fields, "return_token_ids", _FLAG))

    def without_thinking(self) -> "InferenceRequest":
        """Turn thinking off, unless the client's own `chat_template_kwargs` say otherwise.

        `reasoning_effort` doesn't turn it on again: many clients send one whatever the model, and vLLM takes the kwarg.
        """
        given = read_object(self.fields, "chat_template_kwargs") or {}
        kwargs = {"enable_thinking": _FALSE, **given}
        return structs.replace(self, fields={**self.fields, "chat_template_kwargs": _raw(kwargs)})

    def body_for(self, served_name: str, *, token_ids: bool = False, context_tokens: int | None = None) -> bytes:
        """Write the body that a replica gets: its own model name, and usage always asked for, once and at the end.

        vLLM refuses a length beyond its context, so that the one that we fill in is no longer than `context_tokens`.
        """
        fields = {**self.fields, "model": _raw(served_name)}
        if self.stream and not self.wants_usage:
            options = read_object(self.fields, "stream_options") or {}
            # vLLM heeds this one only where usage is asked for, and the client didn't.
            options.pop("continuous_usage_stats", None)
            fields["stream_options"] = _raw({**options, "include_usage": _TRUE})
        if token_ids:
            fields["return_token_ids"] = _TRUE
        if self.fill_max_tokens is not None:
            length = min(self.fill_max_tokens, context_tokens or self.fill_max_tokens)
            fields[self.endpoint.length_keys[0]] = _raw(length)
        return _ENCODER.encode(fields)


def parse_request(
    endpoint: Endpoint,
    body: bytes,
    headers: Mapping[bytes, bytes],
    limits: LimitSettings,
    caller_may: frozenset[str] = frozenset(),
    max_tokens: int | None = None,
) -> InferenceRequest:
    """Read a request's body and headers; RequestError names the key at fault.

    `caller_may` names guarded fields that the caller may use, `max_tokens` is the longest answer that it may ask for.
    """
    _check_content_type(headers)
    fields = _read_fields(body)
    model = _model(fields)
    arrays = check_limits(endpoint, body, fields, limits)
    if nests_deeper(body, fields, arrays, limits.depth):
        raise RequestError(f"the body nests deeper than {limits.depth} levels", code="invalid_json")
    stream = endpoint.generates and bool(read(fields, "stream", _FLAG))
    wants_usage = not endpoint.takes_stream_options or _wants_usage(fields)
    precisions = parse_precisions(fields, headers)
    fields = _permitted(fields, caller_may)
    if endpoint.keeps_answers:
        fields = _stateless(fields)
    return InferenceRequest(
        endpoint=endpoint,
        model=model,
        stream=stream,
        wants_usage=wants_usage,
        fields=fields,
        precisions=precisions,
        floor=parse_floor(headers),
        fill_max_tokens=None if max_tokens is None else _length_to_fill(endpoint, fields, max_tokens),
    )


def _check_content_type(headers: Mapping[bytes, bytes]) -> None:
    given = headers.get(b"content-type", b"")
    if given == b"application/json":
        return
    kind = given.decode("latin-1").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError(f"content-type is {kind[:100] or 'missing'!r}; send application/json")


def _read_fields(body: bytes) -> Fields:
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
    if (name := duplicate_key(body, fields)) is not None:
        raise duplicate_field(name[:100])
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
        raise RequestError(f"'model' is no name: {quoted(model)}; GET /v1/models lists the names", param="model")
    return model


def _wants_usage(fields: Fields) -> bool:
    options = read_object(fields, "stream_options") if "stream_options" in fields else None
    try:
        return options is not None and bool(read(options, "include_usage", _FLAG))
    except RequestError as error:
        param = "stream_options.include_usage"
        raise RequestError(f"{param!r}: {error.__cause__}", param=param) from error


def _permitted(fields: Fields, caller_may: frozenset[str]) -> Fields:
    """Leave out what is ours, and what of the engine's the caller may not use."""
    if fields.keys().isdisjoint(_RARE):
        return fields
    kept = {key: raw for key, raw in fields.items() if key not in GUARDED_FIELDS or key in caller_may}
    kept.pop(PROVIDER, None)
    kwargs = read_object(fields, "chat_template_kwargs")
    if kwargs is None:
        return kept
    left = {key: raw for key, raw in kwargs.items() if key not in GUARDED_KWARGS or key in caller_may}
    as_given = fields["chat_template_kwargs"]
    return {**kept, "chat_template_kwargs": as_given if len(left) == len(kwargs) else _raw(left)}


def _stateless(fields: Fields) -> Fields:
    """Have an answer kept nowhere, and refuse to go on from one that was."""
    for key in EARLIER_KEYS:
        if key in fields and bytes(fields[key]) not in {b"null", b'""'}:
            raise _unsupported(key, "no answer is kept; send the whole conversation as 'input'")
    if read(fields, "background", _FLAG):
        raise _unsupported("background", "no answer is kept to be fetched later")
    return {**fields, "store": _FALSE}


def _unsupported(key: str, why: str) -> RequestError:
    return RequestError(f"{key!r} is not supported: {why}", param=key, code="unsupported")


def _length_to_fill(endpoint: Endpoint, fields: Fields, max_tokens: int) -> int | None:
    """Refuse a longer answer than the caller may ask for; returns the length to ask for where none is given."""
    given = [(key, length) for key in endpoint.length_keys if (length := read(fields, key, _INTEGER)) is not None]
    for key, length in given:
        if length > max_tokens:
            raise RequestError(
                f"{key!r} is {format_number(length)}, the limit of this API key is {max_tokens}", param=key
            )
    default = endpoint.length_default_tokens
    if given or not endpoint.length_keys or (default is not None and default <= max_tokens):
        return None
    return max_tokens


def _raw(value: Any) -> msgspec.Raw:
    return msgspec.Raw(_ENCODER.encode(value))
