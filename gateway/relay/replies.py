"""What a replica's bytes become on their way to the client: the asked model's name, our error shape, nothing else."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from gateway.errors import NO_JSON, GatewayError, ReplicaFull, RequestError, UpstreamError
from gateway.relay.accounting import Usage

Fields = dict[str, msgspec.Raw]

# A replica that refuses our credential or no longer knows its own model is broken, whatever the client sent.
OUR_FAULT = frozenset({401, 403})
# vLLM says 503 when its queue is full.
FULL = frozenset({429, 503})

_ENCODER = msgspec.json.Encoder()
_FIELDS = msgspec.json.Decoder(Fields)
_NULL = msgspec.Raw(b"null")


class _Failure(msgspec.Struct):
    error: Any = None


_USAGE = msgspec.json.Decoder(Usage | None)
_FAILURE = msgspec.json.Decoder(_Failure)

# Whole answers of chat and completions, responses, and messages: each in its own words.
_FINISH = re.compile(rb'"(?:finish_reason|stop_reason|status)"\s*:\s*"([a-z_]{1,32})"')


def renamed(body: bytes, model: str, shape: Callable[[Fields], Fields] | None = None) -> tuple[bytes, Usage | None]:
    """Put the asked model's name into a whole answer, and shape the rest; GatewayError if it is none."""
    try:
        fields = _FIELDS.decode(body)
        usage = _USAGE.decode(fields["usage"]) if "usage" in fields else None
    except NO_JSON as error:
        raise UpstreamError("a replica's answer is no JSON object", code="upstream_invalid") from error
    if fields.get("error", _NULL) != _NULL:
        raise failure_told(body)
    if "model" in fields:
        fields["model"] = msgspec.Raw(_ENCODER.encode(model))
    return _ENCODER.encode(shape(fields) if shape else fields), usage


def finish_of(body: bytes) -> str:
    """Why a whole answer ended; UpstreamError if the engine gave it up, which looks like an answer and is none."""
    # Near the end, as vLLM writes it; text can't hold it unescaped.
    begin = max(body.rfind(b'"finish_reason":'), 0)
    found = _FINISH.search(body, begin)
    finish = found[1].decode() if found else ""
    if finish == "abort":
        raise UpstreamError("a replica gave the answer up in the middle", code="upstream_aborted")
    return finish


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
    if status in FULL:
        return ReplicaFull()
    if not 400 <= status < 500:
        return UpstreamError(f"a replica failed with status {status}")
    named = param.get("param") if isinstance(param, dict) else None
    if status == 404:
        # A replica that doesn't know its own model is broken; one without such an endpoint has another kind of model.
        if named == "model" or (kind == "NotFoundError" and "model" in message):
            return UpstreamError("a replica doesn't know its model", code="upstream_misconfigured")
        message, code = "the model's engine has no such endpoint", "endpoint_not_supported"
    error = RequestError(message or f"the engine refused the request with status {status}", param=named, code=code)
    error.status = status
    error.type = kind or error.type
    return error


def failure_told(data: bytes) -> GatewayError:
    """Translate an error that a replica tells under status 200; vLLM writes the one that it would have had as code."""
    try:
        error = _FAILURE.decode(data).error
    except NO_JSON:
        error = None
    code = error.get("code") if isinstance(error, dict) else None
    return refusal(code if isinstance(code, int) else UpstreamError.status, data)


def held_seconds(headers: Mapping[bytes, bytes]) -> float | None:
    """How long a replica asks to be spared, if it says; RFC 9110's dates are as good as nothing."""
    try:
        return float(headers.get(b"retry-after", b""))
    except ValueError:
        return None


def _told(error: Any) -> tuple[str, str, str]:
    """Message, type and code of an error in any of the shapes that engines and proxies use."""
    if isinstance(error, dict):
        code = error.get("code")
        return str(error.get("message") or ""), str(error.get("type") or ""), "" if code is None else str(code)
    return ("" if error is None else str(error)), "", ""
