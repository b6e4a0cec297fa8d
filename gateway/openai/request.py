"""Parses a request body once: decodes the few fields that the gateway uses, and keeps the bytes of all others."""

from collections.abc import Collection, Mapping
from typing import Any

import msgspec
from msgspec import structs

from config.schema import NO_FLOOR, Floor, LimitSettings
from gateway.errors import INVALID_JSON, RequestError
from gateway.openai.constraints import PROVIDER, parse_floor, parse_precisions
from gateway.openai.endpoints import Endpoint
from gateway.openai.fields import FLAG, INTEGER, duplicate_field, quoted, read, read_object
from gateway.openai.json_scan import Fields, duplicate_key, nests_deeper
from gateway.openai.limits import GUARDED_FIELDS, GUARDED_KWARGS, check_limits, format_number
from gateway.openai.media import ESCAPE, KEY_END, check_media

# Fields that continue a stored response. vLLM stores responses in one process, if at all.
STORED_RESPONSE_KEYS = ("previous_response_id", "conversation")

# `tool_choice` of OpenAI's and Anthropic's clients.
NO_TOOLS = ("none", {"type": "none"})
# A longer list of tools is not decoded to see whether it is empty.
MAX_EMPTY_BYTES = 16

# vLLM's largest request model has about 60 fields.
MAX_KEYS = 256
MAX_MODEL_CHARACTERS = 256

_ENCODER = msgspec.json.Encoder()
_FIELDS = msgspec.json.Decoder(Fields)
_STRING = msgspec.json.Decoder(str)
_ANY: "msgspec.json.Decoder[Any]" = msgspec.json.Decoder()
_OPTIONAL_STRING = msgspec.json.Decoder(str | None)
_TRUE, _FALSE = msgspec.Raw(b"true"), msgspec.Raw(b"false")
_FILTERED = GUARDED_FIELDS | {PROVIDER, "chat_template_kwargs"}


class InferenceRequest(msgspec.Struct, frozen=True):
    """A parsed request. `fields` are the top-level fields of the body that a replica gets, each value as received."""

    endpoint: Endpoint
    model: str
    stream: bool
    # Whether the client gets the usage of a stream.
    wants_usage: bool
    fields: Fields
    precisions: frozenset[str] | None = None
    floor: Floor = NO_FLOOR
    # The API key's `max_tokens`, to be sent where the client limits the completion length nowhere.
    fill_max_tokens: int | None = None

    @property
    def wants_token_ids(self) -> bool:
        """Whether the client itself requests token ids."""
        return bool(read(self.fields, "return_token_ids", FLAG))

    @property
    def uses_tools(self) -> bool:
        """Whether the answer may call tools: there are some, and `tool_choice` does not rule them out."""
        fields = self.fields
        if "tools" not in fields or not self.endpoint.calls_tools:
            return False
        if len(fields["tools"]) <= MAX_EMPTY_BYTES and not _value(fields["tools"]):
            return False
        return "tool_choice" not in fields or _value(fields["tool_choice"]) not in NO_TOOLS

    def without_thinking(self) -> "InferenceRequest":
        """Return the request with `enable_thinking` false in `chat_template_kwargs`, unless the client sets it there.

        Without a prompt for the chat template it is returned as it is. `reasoning_effort`, `reasoning` and Anthropic's
        `thinking` do not turn thinking on again: many clients always send them, and vLLM goes by the kwarg.
        """
        if self.endpoint.chat_key not in self.fields:
            return self
        client_kwargs = read_object(self.fields, "chat_template_kwargs") or {}
        kwargs = {"enable_thinking": _FALSE, **client_kwargs}
        return structs.replace(self, fields={**self.fields, "chat_template_kwargs": _raw(kwargs)})

    def body_for(self, served_name: str, token_ids: bool = False, context_tokens: int | None = None) -> bytes:
        """Encode the body for a replica, with its model name and with usage requested at the end of a stream.

        `token_ids` requests token ids as well. A filled-in completion length is capped at `context_tokens`, since vLLM
        rejects a length beyond its context.
        """
        fields = {**self.fields, "model": _raw(served_name)}
        if self.stream and not self.wants_usage:
            options = read_object(self.fields, "stream_options") or {}
            # Without `include_usage` vLLM ignores this option, and the client did not set that.
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
    media_domains: Collection[str] = (),
) -> InferenceRequest:
    """Parse and check a request; RequestError names the invalid field in `param`.

    `caller_may` are the guarded fields that the caller's key may set, `max_tokens` is its limit on completion tokens,
    `media_domains` are the hosts that media in messages may be loaded from.
    """
    _check_content_type(headers)
    fields = _read_fields(body)
    model = _model(fields)
    arrays = check_limits(endpoint, body, fields, limits)
    if nests_deeper(body, fields, arrays, limits.depth):
        raise RequestError(f"the body nests deeper than {limits.depth} levels", code="invalid_json")
    if KEY_END in body or ESCAPE in body:
        check_media(body, fields, media_domains)
    stream = endpoint.generates and bool(read(fields, "stream", FLAG))
    wants_usage = not endpoint.takes_stream_options or _wants_usage(fields)
    precisions = parse_precisions(fields, headers)
    fields = _forwarded(fields, caller_may)
    if endpoint.keeps_answers:
        fields = _stateless(fields)
    if endpoint.json_encodings and "encoding_format" in fields:
        _check_encoding(endpoint, fields)
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
    header = headers.get(b"content-type", b"")
    if header == b"application/json":
        return
    media_type = header.decode("latin-1").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise RequestError(f"content-type is {media_type[:100] or 'missing'!r}; send application/json")


def _read_fields(body: bytes) -> Fields:
    """Decode the body's top level; RequestError for invalid JSON and for what two parsers could read differently."""
    try:
        fields = _FIELDS.decode(body)
        if not body.isascii():
            # msgspec does not validate the UTF-8 of values that it keeps as raw bytes.
            body.decode()
    except INVALID_JSON as error:
        raise RequestError(_invalid_json(body, error), code="invalid_json") from error
    if len(fields) > MAX_KEYS:
        raise RequestError(f"the body has {len(fields)} keys, the limit is {MAX_KEYS}")
    if (name := duplicate_key(body, fields)) is not None:
        raise duplicate_field(name[:100])
    return fields


def _invalid_json(body: bytes, error: Exception) -> str:
    if not body.strip():
        return "the body is empty; send a JSON object"
    if body.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        return "the body begins with a byte order mark; send plain UTF-8"
    return f"the body is not a JSON object: {error}"


def _model(fields: Fields) -> str:
    model = read(fields, "model", _STRING)
    if not model:
        raise RequestError("'model' is missing; GET /v1/models lists the names", param="model")
    if len(model) > MAX_MODEL_CHARACTERS or not model.isprintable():
        message = f"'model' is not a valid model name: {quoted(model)}; GET /v1/models lists the names"
        raise RequestError(message, param="model")
    return model


def _wants_usage(fields: Fields) -> bool:
    options = read_object(fields, "stream_options") if "stream_options" in fields else None
    try:
        return options is not None and bool(read(options, "include_usage", FLAG))
    except RequestError as error:
        param = "stream_options.include_usage"
        raise RequestError(f"{param!r}: {error.__cause__}", param=param) from error


def _forwarded(fields: Fields, caller_may: frozenset[str]) -> Fields:
    """Drop `provider`, and guarded fields and template kwargs that the caller may not set."""
    if fields.keys().isdisjoint(_FILTERED):
        return fields
    forwarded = {key: raw for key, raw in fields.items() if key not in GUARDED_FIELDS or key in caller_may}
    forwarded.pop(PROVIDER, None)
    kwargs = read_object(fields, "chat_template_kwargs")
    if kwargs is None:
        return forwarded
    allowed = {key: raw for key, raw in kwargs.items() if key not in GUARDED_KWARGS or key in caller_may}
    received = fields["chat_template_kwargs"]
    return {**forwarded, "chat_template_kwargs": received if len(allowed) == len(kwargs) else _raw(allowed)}


def _stateless(fields: Fields) -> Fields:
    """Set `store` to false; RequestError for fields that need stored responses."""
    for key in STORED_RESPONSE_KEYS:
        if key in fields and bytes(fields[key]) not in {b"null", b'""'}:
            raise _unsupported(key, "responses are not stored; send the whole conversation as 'input'")
    if read(fields, "background", FLAG):
        raise _unsupported("background", "responses are not stored, so none can be fetched later")
    return {**fields, "store": _FALSE}


def _check_encoding(endpoint: Endpoint, fields: Fields) -> None:
    """RequestError if the response would not be JSON: such a response passes for a failure of the replica."""
    encoding = read(fields, "encoding_format", _OPTIONAL_STRING)
    if encoding is not None and encoding not in endpoint.json_encodings:
        known = " or ".join(endpoint.json_encodings)
        raise _unsupported("encoding_format", f"{quoted(encoding)} is not relayed; send {known}")


def _unsupported(key: str, why: str) -> RequestError:
    return RequestError(f"{key!r} is not supported: {why}", param=key, code="unsupported")


def _length_to_fill(endpoint: Endpoint, fields: Fields, max_tokens: int) -> int | None:
    """Return the completion length to send, None to leave it to the client or the endpoint's default.

    Raises RequestError if the client asks for more than `max_tokens`.
    """
    requested = [(key, length) for key in endpoint.length_keys if (length := read(fields, key, INTEGER)) is not None]
    for key, length in requested:
        if length > max_tokens:
            raise RequestError(
                f"{key!r} is {format_number(length)}, the limit of this API key is {max_tokens}", param=key
            )
    default = endpoint.length_default_tokens
    if requested or not endpoint.length_keys or (default is not None and default <= max_tokens):
        return None
    return max_tokens


def _value(raw: msgspec.Raw) -> Any:
    """Decode a value that only the engine judges; one that can't be decoded is returned as it is."""
    try:
        return _ANY.decode(raw)
    except INVALID_JSON:
        return raw


def _raw(value: Any) -> msgspec.Raw:
    return msgspec.Raw(_ENCODER.encode(value))
