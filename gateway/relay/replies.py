"""What a replica's bytes become on their way to the client: the asked model's name, our error shape, nothing else."""

from dataclasses import dataclass
from typing import Any

import msgspec

from gateway.api.sse import DONE, data_of, error_event
from gateway.errors import GatewayError, RequestError, Unavailable, UpstreamError
from gateway.relay.accounting import Usage

# A replica that refuses our credential or no longer knows its own model is broken, whatever the client sent.
OUR_FAULT = frozenset({401, 403, 404})

_ENCODER = msgspec.json.Encoder()
_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])


class _Chunk(msgspec.Struct):
    usage: Usage | None = None
    choices: list[msgspec.Raw] | None = None


class _ErrorEvent(msgspec.Struct):
    error: Any = None


_CHUNK = msgspec.json.Decoder(_Chunk)
_USAGE = msgspec.json.Decoder(Usage | None)
_ERROR = msgspec.json.Decoder(_ErrorEvent)


def renamed(body: bytes, model: str) -> tuple[bytes, Usage | None]:
    """Put the asked model's name into a whole answer; UpstreamError if it is no JSON object."""
    try:
        fields = _FIELDS.decode(body)
        usage = _USAGE.decode(fields["usage"]) if "usage" in fields else None
    except msgspec.DecodeError as error:
        raise UpstreamError("a replica's answer is no JSON object", code="upstream_invalid") from error
    fields["model"] = msgspec.Raw(_ENCODER.encode(model))
    return _ENCODER.encode(fields), usage


@dataclass(slots=True)
class Transcript:
    """Follows a stream event by event."""

    served_name: str
    model: str
    wants_usage: bool
    usage: Usage | None = None
    finished: bool = False
    failed: bool = False
    _model_pairs: tuple[tuple[bytes, bytes], ...] = ()

    def __post_init__(self) -> None:
        served, asked = _ENCODER.encode(self.served_name), _ENCODER.encode(self.model)
        # `model` stands before `choices`, so its first occurrence is the right one; text can't hold it unescaped.
        self._model_pairs = tuple((key + served, key + asked) for key in (b'"model":', b'"model": '))

    def passed_on(self, event: bytes) -> bytes:
        """Say what the client gets for an event; b"" for nothing."""
        if event == DONE:
            self.finished = True
            return event
        if event.startswith(b":"):
            return event
        if not event.startswith(b"data:"):
            # An event without data crashes the OpenAI SDK.
            return b""
        if b'"error"' in event[:20]:
            return self._error(event)
        if b'"usage":{' in event or b'"usage": {' in event:
            chunk = _CHUNK.decode(data_of(event))
            self.usage = chunk.usage
            if not self.wants_usage and chunk.choices == []:
                return b""
        for served, asked in self._model_pairs:
            if served in event:
                return event.replace(served, asked, 1)
        return event

    def _error(self, event: bytes) -> bytes:
        self.failed = True
        message, kind, code = _told(_ERROR.decode(data_of(event)).error)
        return error_event(message, kind or "server_error", code or "upstream_error")


def carries_token(event: bytes) -> bool:
    """Tell an event with something in it from a chat's opening, which has a role and no text."""
    return event.startswith(b"data: {") and b'"role":"assistant","content":""' not in event


def refusal(status: int, body: bytes) -> GatewayError:
    """Translate a replica's error reply; the text of a 5xx stays inside."""
    try:
        fields = _FIELDS.decode(body)
        message, kind, code = _told(msgspec.json.decode(fields.get("error") or fields.get("detail") or b"null"))
        param = msgspec.json.decode(fields.get("error", b"null"))
    except msgspec.DecodeError:
        message, kind, code, param = "", "", "", None
    if status in OUR_FAULT:
        return UpstreamError(f"a replica answered {status} to the gateway", code="upstream_misconfigured")
    if status == Unavailable.status:
        return Unavailable("every replica that may answer is busy", code="overloaded")
    if status >= 500:
        return UpstreamError(f"a replica failed with status {status}")
    named = param.get("param") if isinstance(param, dict) else None
    error = RequestError(message or f"the engine refused the request with status {status}", param=named, code=code)
    error.status = status
    error.type = kind or error.type
    return error


def _told(error: Any) -> tuple[str, str, str]:
    """Message, type and code of an error in any of the shapes that engines and proxies use."""
    if isinstance(error, dict):
        code = error.get("code")
        return str(error.get("message") or ""), str(error.get("type") or ""), "" if code is None else str(code)
    return ("" if error is None else str(error)), "", ""
