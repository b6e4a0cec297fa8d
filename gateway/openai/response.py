"""Rewrites a replica's whole response for the client: the requested model name, and errors in the gateway's shape."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from gateway.errors import INVALID_JSON, EngineError, GatewayError, ReplicaFull, RequestError, UpstreamError
from gateway.openai.usage import Usage

Fields = dict[str, msgspec.Raw]

# The replica rejects the gateway's own credential: a misconfiguration, not the client's error.
CREDENTIAL_ERRORS = frozenset({401, 403})
# Of something between the gateway and the engine, which no engine says of itself.
PROXY_ERRORS = frozenset({502, 504})
# vLLM responds 503 when its queue is full.
OVERLOAD_ERRORS = frozenset({429, 503})

_ENCODER = msgspec.json.Encoder()
_FIELDS = msgspec.json.Decoder(Fields)
_USAGE = msgspec.json.Decoder(Usage | None)
_ERROR = msgspec.json.Decoder(dict[str, Any])
_STRING = msgspec.json.Decoder(str)
# Cannot match inside generated text: quotes are escaped there.
_FINISH_REASON = re.compile(rb'"finish_reason"\s*:\s*"([a-z_]{1,32})"')
_FINISH_KEYS = ("stop_reason", "status")  # of messages, and of responses
_FUNCTION_CALL = re.compile(rb'"type"\s*:\s*"function_call"')
# How vLLM says that a prompt is too long; the code is OpenAI's, at which agents shorten their conversation.
_TOO_LONG = "maximum context length"
CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
# A message that begins so is about the engine and not about the request.
_ENGINE_DIED = "EngineCore"


def parse_response(answer: bytes) -> Fields:
    """Decode a response's top level; an error object under status 200 is raised like an error status."""
    try:
        fields = _FIELDS.decode(answer)
    except INVALID_JSON as error:
        raise _invalid_response() from error
    if bytes(fields.get("error", b"null")) != b"null":
        raise error_from_response(embedded_status(answer), answer)
    return fields


def embedded_status(data: bytes) -> int:
    """HTTP status of an error object that was sent with status 200: vLLM puts it into `code`; 502 otherwise."""
    try:
        error = _ERROR.decode(data).get("error")
    except INVALID_JSON:
        return UpstreamError.status
    code = error.get("code") if isinstance(error, dict) else None
    return code if isinstance(code, int) else UpstreamError.status


def rewrite_response(
    fields: Fields, model: str, transform: Callable[[Fields], Fields] | None = None
) -> tuple[bytes, Usage | None]:
    """Encode a response with the requested model name, after `transform`; returns it with its usage.

    Raises UpstreamError if `usage` is malformed.
    """
    try:
        usage = _USAGE.decode(fields["usage"]) if "usage" in fields else None
    except INVALID_JSON as error:
        raise _invalid_response() from error
    if "model" in fields:
        fields["model"] = msgspec.Raw(_ENCODER.encode(model))
    return _ENCODER.encode(transform(fields) if transform else fields), usage


def finish_reason(fields: Fields) -> str:
    """Return why generation ended; UpstreamError if the engine aborted it, which otherwise looks like a response.

    Only fields that the engine writes are read: /v1/responses echoes objects of the client, with any keys.
    """
    if "choices" in fields:
        reasons = _FINISH_REASON.findall(fields["choices"])
        if b"abort" in reasons:
            raise UpstreamError("a replica aborted the generation", code="upstream_aborted")
        return reasons[-1].decode() if reasons else ""
    finish = next((reason for key in _FINISH_KEYS if (reason := _string(fields, key))), "")
    if finish == "failed":
        raise UpstreamError("a replica failed during the generation")
    return reason_of_response(fields) or finish


def reason_of_response(fields: Fields) -> str:
    """Return why the generation of a `/v1/responses` object ended, as far as its status does not tell."""
    if b"content_filter" in bytes(fields.get("incomplete_details", b"")):
        return "content_filter"
    if _string(fields, "status") == "completed" and _FUNCTION_CALL.search(fields.get("output", b"")):
        return "tool_calls"
    return ""


def _string(fields: Fields, key: str) -> str:
    try:
        return _STRING.decode(fields.get(key, b'""'))
    except INVALID_JSON:
        return ""


def _invalid_response() -> UpstreamError:
    return UpstreamError("a replica's response is not a valid JSON object", code="upstream_invalid")


def error_from_response(status: int, body: bytes, backoff_seconds: float | None = None) -> GatewayError:
    """Translate a replica's error response; the message of a 5xx is not passed to the client.

    `backoff_seconds` is the replica's `retry-after`. Engines and proxies use several shapes of error bodies.
    """
    try:
        fields = _FIELDS.decode(body)
        message, kind, code = _error_parts(msgspec.json.decode(fields.get("error") or fields.get("detail") or b"null"))
        error_object = msgspec.json.decode(fields.get("error", b"null"))
    except INVALID_JSON:
        message, kind, code, error_object = "", "", "", None
    if status in CREDENTIAL_ERRORS:
        return UpstreamError(
            f"a replica rejected the gateway's credential with status {status}", code="upstream_misconfigured"
        )
    if status in OVERLOAD_ERRORS:
        return ReplicaFull(backoff_seconds=backoff_seconds)
    if not 400 <= status < 500:
        if status < 500 or status in PROXY_ERRORS or not message or message.startswith(_ENGINE_DIED):
            return UpstreamError(f"a replica failed with status {status}")
        return EngineError(status, message)
    param = error_object.get("param") if isinstance(error_object, dict) else None
    if status == 404:
        # A replica that does not serve its own model is misconfigured. One without the endpoint has another model type.
        if param == "model" or (kind == "NotFoundError" and "model" in message):
            return UpstreamError("a replica does not serve its model", code="upstream_misconfigured")
        message, code = "the model does not support this endpoint", "endpoint_not_supported"
    if not code and _TOO_LONG in message:
        code = CONTEXT_LENGTH_EXCEEDED
    error = RequestError(message or f"the engine rejected the request with status {status}", param=param, code=code)
    error.status = status
    error.type = kind or error.type
    return error


def retry_after_seconds(headers: Mapping[bytes, bytes]) -> float | None:
    """Seconds in a replica's `retry-after`, None without one; the date format of RFC 9110 is not supported."""
    try:
        seconds = float(headers.get(b"retry-after", b""))
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) and seconds > 0 else None


def _error_parts(error: Any) -> tuple[str, str, str]:
    """Return message, type and code of an error object, or of a bare string; a number is no code, but the status."""
    if isinstance(error, dict):
        code = error.get("code")
        word = code if isinstance(code, str) and not code.isdecimal() else ""
        return str(error.get("message") or ""), str(error.get("type") or ""), word
    return ("" if error is None else str(error)), "", ""
