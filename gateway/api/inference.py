"""Parse a request once: read the few keys that we decide on, keep the bytes of all others as they came."""

from dataclasses import dataclass, replace
from typing import Any

import msgspec

from config.schema import Floor, LimitSettings
from gateway.errors import NO_JSON, RequestError

PRECISION_HEADER = "x-quantgate-precision"
FLOOR_HEADER = "x-quantgate-floor"
# Ours, never the engine's: the key that OpenRouter's clients send to choose a precision.
OWN_KEYS = ("provider",)

NO_FLOOR = Floor()

_ENCODER = msgspec.json.Encoder()
_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])


@dataclass(frozen=True, slots=True)
class Inference:
    """What a client asked for; `fields` holds the body's top level, each value as its bytes."""

    endpoint: str
    model: str
    stream: bool
    wants_usage: bool
    fields: dict[str, msgspec.Raw]
    precisions: frozenset[str] | None = None
    floor: Floor = NO_FLOOR

    @property
    def wants_token_ids(self) -> bool:
        """Tell whether the client itself asks for token ids."""
        return bool(_value(self.fields, "return_token_ids", bool | None))

    def without_thinking(self) -> "Inference":
        """Turn thinking off, unless the client's own `chat_template_kwargs` say otherwise.

        `reasoning_effort` doesn't turn it on again: many clients send one whatever the model, and vLLM takes the kwarg.
        """
        given = _value(self.fields, "chat_template_kwargs", dict[str, msgspec.Raw] | None) or {}
        kwargs = {"enable_thinking": msgspec.Raw(b"false"), **given}
        return replace(self, fields={**self.fields, "chat_template_kwargs": msgspec.Raw(_ENCODER.encode(kwargs))})

    def body_for(self, served_name: str, *, token_ids: bool = False) -> bytes:
        """Write the body that a replica gets: its own model name, usage always asked for, our extras left out."""
        fields = {key: value for key, value in self.fields.items() if key not in OWN_KEYS}
        fields["model"] = msgspec.Raw(_ENCODER.encode(served_name))
        if self.stream and not self.wants_usage:
            options = _value(self.fields, "stream_options", dict[str, Any] | None) or {}
            fields["stream_options"] = msgspec.Raw(_ENCODER.encode({**options, "include_usage": True}))
        if token_ids:
            fields["return_token_ids"] = msgspec.Raw(b"true")
        return _ENCODER.encode(fields)


def parse_inference(endpoint: str, body: bytes, headers: dict[str, str], limits: LimitSettings) -> Inference:
    """Read a request's body and headers; RequestError names the key at fault."""
    try:
        fields = _FIELDS.decode(body)
    except NO_JSON as error:
        raise RequestError(f"the body is no JSON object: {error}", code="invalid_json") from error
    model = _value(fields, "model", str)
    if not model:
        raise RequestError("'model' is missing; GET /v1/models lists the names", param="model")
    answers = _value(fields, "n", int | None) or 1
    if answers > limits.n:
        raise RequestError(f"'n' is {answers}, the limit is {limits.n}", param="n")
    stream = bool(_value(fields, "stream", bool | None))
    options = _value(fields, "stream_options", dict[str, Any] | None) or {}
    return Inference(
        endpoint=endpoint,
        model=model,
        stream=stream,
        wants_usage=bool(options.get("include_usage")),
        fields=fields,
        precisions=_precisions(fields, headers),
        floor=_floor(headers.get(FLOOR_HEADER, "")),
    )


def _value(fields: dict[str, msgspec.Raw], key: str, kind: Any) -> Any:
    raw = fields.get(key)
    if raw is None:
        return None
    try:
        return msgspec.json.decode(raw, type=kind)
    except NO_JSON as error:
        raise RequestError(f"{key!r}: {error}", param=key) from error


def _precisions(fields: dict[str, msgspec.Raw], headers: dict[str, str]) -> frozenset[str] | None:
    """The precisions that the caller accepts; the header and the body's `provider` must both agree."""
    provider = _value(fields, "provider", dict[str, Any] | None) or {}
    named = provider.get("quantizations")
    if named is not None and not (isinstance(named, list) and all(isinstance(item, str) for item in named)):
        raise RequestError("'provider.quantizations' is no list of names such as int8", param="provider.quantizations")
    asked = [frozenset(named)] if named else []
    if header := headers.get(PRECISION_HEADER):
        asked.append(frozenset(filter(None, (part.strip() for part in header.split(",")))))
    return frozenset.intersection(*asked) if asked else None


def _floor(header: str) -> Floor:
    limits: dict[str, float] = {}
    for part in filter(None, header.split(",")):
        measure, _, value = part.partition("=")
        if measure.strip() not in Floor.model_fields:
            known = ", ".join(Floor.model_fields)
            raise RequestError(f"{FLOOR_HEADER}: {measure.strip()!r} is no measure; known: {known}", param=FLOOR_HEADER)
        try:
            limits[measure.strip()] = float(value)
        except ValueError:
            raise RequestError(f"{FLOOR_HEADER}: {part.strip()!r} has no number", param=FLOOR_HEADER) from None
    try:
        return Floor.model_validate(limits)
    except ValueError as error:
        raise RequestError(f"{FLOOR_HEADER}: {header!r} is out of range", param=FLOOR_HEADER) from error
