"""What a replica's bytes become on their way to the client: the asked model's name, our error shape, nothing else."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from gateway.api.sse import DONE, data_of, error_event
from gateway.errors import NO_JSON, GatewayError, RequestError, Unavailable, UpstreamError
from gateway.relay.accounting import Usage

Fields = dict[str, msgspec.Raw]

# A replica that refuses our credential or no longer knows its own model is broken, whatever the client sent.
OUR_FAULT = frozenset({401, 403, 404})

_ENCODER = msgspec.json.Encoder()
_FIELDS = msgspec.json.Decoder(Fields)


class _Chunk(msgspec.Struct):
    usage: Usage | None = None
    choices: list[msgspec.Raw] | None = None


class _ErrorEvent(msgspec.Struct):
    error: Any = None


# `model` stands before `choices`, so its first occurrence is the right one; text can't hold it unescaped.
_MODEL = re.compile(rb'("model"\s*:\s*)"(?:[^"\\]|\\.)*"')
_ERROR_BEGIN = re.compile(rb'\{\s*"error"\s*:(?!\s*null)')
_USAGE_BEGIN = re.compile(rb'"usage"\s*:\s*\{')

_CHUNK = msgspec.json.Decoder(_Chunk)
_USAGE = msgspec.json.Decoder(Usage | None)
_ERROR = msgspec.json.Decoder(_ErrorEvent)


def renamed(
    body: bytes, model: str, shape: Callable[[Fields], Fields] = lambda fields: fields
) -> tuple[bytes, Usage | None]:
    """Put the asked model's name into a whole answer, and shape the rest; UpstreamError if it is no JSON object."""
    try:
        fields = _FIELDS.decode(body)
        usage = _USAGE.decode(fields["usage"]) if "usage" in fields else None
    except NO_JSON as error:
        raise UpstreamError("a replica's answer is no JSON object", code="upstream_invalid") from error
    fields["model"] = msgspec.Raw(_ENCODER.encode(model))
    return _ENCODER.encode(shape(fields)), usage


@dataclass(slots=True)
class Transcript:
    """Follows a stream event by event."""

    model: str
    wants_usage: bool
    usage: Usage | None = None
    finished: bool = False
    failure: GatewayError | None = None
    _name: bytes = field(init=False)

    def __post_init__(self) -> None:
        self._name = _ENCODER.encode(self.model)

    def passed_on(self, event: bytes) -> bytes:
        """Say what the client gets for an event; b"" for nothing."""
        data = data_of(event)
        if not data:
            # Comments keep readers patient; an event without data crashes the OpenAI SDK.
            only_comments = all(line.startswith(b":") for line in event.split(b"\n") if line)
            return event if only_comments else b""
        if data == DONE:
            self.finished = True
            return event
        if _ERROR_BEGIN.match(data):
            return self._error(data)
        if _USAGE_BEGIN.search(data) and self._only_usage(data) and not self.wants_usage:
            return b""
        found = _MODEL.search(event)
        return event[: found.end(1)] + self._name + event[found.end() :] if found else event

    def _only_usage(self, data: bytes) -> bool:
        try:
            chunk = _CHUNK.decode(data)
        except NO_JSON:
            # Nothing to count, and for the client to judge.
            return False
        self.usage = chunk.usage
        return chunk.choices == []

    def _error(self, data: bytes) -> bytes:
        self.failure = refusal(_status(data), data)
        return error_event(self.failure.message, self.failure.type, self.failure.code)


def carries_token(event: bytes) -> bool:
    """Tell an event with something in it from a chat's opening, which has a role and no text."""
    return event.startswith(b"data: {") and b'"role":"assistant","content":""' not in event


def refusal(status: int, body: bytes) -> GatewayError:
    """Translate a replica's error reply; the text of a 5xx stays inside."""
    try:
        fields = _FIELDS.decode(body)
        message, kind, code = _told(msgspec.json.decode(fields.get("error") or fields.get("detail") or b"null"))
        param = msgspec.json.decode(fields.get("error", b"null"))
    except NO_JSON:
        message, kind, code, param = "", "", "", None
    if status in OUR_FAULT:
        return UpstreamError(f"a replica answered {status} to the gateway", code="upstream_misconfigured")
    if status == Unavailable.status:
        return Unavailable("every replica that may answer is busy", code="overloaded")
    if not 400 <= status < 500:
        return UpstreamError(f"a replica failed with status {status}")
    named = param.get("param") if isinstance(param, dict) else None
    error = RequestError(message or f"the engine refused the request with status {status}", param=named, code=code)
    error.status = status
    error.type = kind or error.type
    return error


def _status(data: bytes) -> int:
    """The HTTP status that an error event would have had; vLLM writes it as the code."""
    try:
        error = _ERROR.decode(data).error
    except NO_JSON:
        return UpstreamError.status
    code = error.get("code") if isinstance(error, dict) else None
    return code if isinstance(code, int) else UpstreamError.status


def _told(error: Any) -> tuple[str, str, str]:
    """Message, type and code of an error in any of the shapes that engines and proxies use."""
    if isinstance(error, dict):
        code = error.get("code")
        return str(error.get("message") or ""), str(error.get("type") or ""), "" if code is None else str(code)
    return ("" if error is None else str(error)), "", ""
