"""What a replica's bytes become on their way to the client: the asked model's name, our error shape, nothing else."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from gateway.errors import NO_JSON, GatewayError, ReplicaFull, RequestError, UpstreamError
from gateway.openai.usage import Usage

Fields = dict[str, msgspec.Raw]

# A replica that refuses our credential is broken, whatever the client sent.
OUR_FAULT = frozenset({401, 403})
# vLLM says 503 when its queue is full.
FULL = frozenset({429, 503})

_ENCODER = msgspec.json.Encoder()
_FIELDS = msgspec.json.Decoder(Fields)


_USAGE = msgspec.json.Decoder(Usage | None)
_ERROR = msgspec.json.Decoder(dict[str, Any])
_WORD = msgspec.json.Decoder(str)
# Text can't hold it unescaped.
_FINISH = re.compile(rb'"finish_reason"\s*:\s*"([a-z_]{1,32})"')
_WORDS = ("stop_reason", "status")  # of messages, and of responses


def parse_response(answer: bytes) -> Fields:
    """Read a whole answer's top level; what it says instead of an answer is raised, as another status would be."""
    try:
        fields = _FIELDS.decode(answer)
    except NO_JSON as error:
        raise _no_object() from error
    if bytes(fields.get("error", b"null")) != b"null":
        raise error_from_response(embedded_status(answer), answer)
    return fields


def embedded_status(data: bytes) -> int:
    """The HTTP status that an error under a 200 would have had; vLLM writes it as the code."""
    try:
        error = _ERROR.decode(data).get("error")
    except NO_JSON:
        return UpstreamError.status
    code = error.get("code") if isinstance(error, dict) else None
    return code if isinstance(code, int) else UpstreamError.status


def rewrite_response(
    fields: Fields, model: str, shape: Callable[[Fields], Fields] | None = None
) -> tuple[bytes, Usage | None]:
    """Put the asked model's name into a whole answer, and shape the rest; UpstreamError if its usage is none."""
    try:
        usage = _USAGE.decode(fields["usage"]) if "usage" in fields else None
    except NO_JSON as error:
        raise _no_object() from error
    if "model" in fields:
        fields["model"] = msgspec.Raw(_ENCODER.encode(model))
    return _ENCODER.encode(shape(fields) if shape else fields), usage


def finish_reason(fields: Fields) -> str:
    """Why a whole answer ended; UpstreamError if the engine gave it up, which looks like an answer and is none.

    Looked for only where the engine writes: /v1/responses repeats what clients make up, and calls it by any name.
    """
    if "choices" in fields:
        reasons = _FINISH.findall(fields["choices"])
        if b"abort" in reasons:
            raise UpstreamError("a replica gave the answer up in the middle", code="upstream_aborted")
        return reasons[-1].decode() if reasons else ""
    finish = next((word for key in _WORDS if (word := _word(fields, key))), "")
    if finish == "failed":
        raise UpstreamError("a replica failed in the middle of the answer")
    return finish


def _word(fields: Fields, key: str) -> str:
    try:
        return _WORD.decode(fields.get(key, b'""'))
    except NO_JSON:
        return ""


def _no_object() -> UpstreamError:
    return UpstreamError("a replica's answer is no JSON object", code="upstream_invalid")


def error_from_response(status: int, body: bytes, held_seconds: float | None = None) -> GatewayError:
    """Translate a replica's error reply; the text of a 5xx stays inside. `held_seconds`: to be spared for so long."""
    try:
        fields = _FIELDS.decode(body)
        message, kind, code = _told(msgspec.json.decode(fields.get("error") or fields.get("detail") or b"null"))
        param = msgspec.json.decode(fields.get("error", b"null"))
    except NO_JSON:
        message, kind, code, param = "", "", "", None
    if status in OUR_FAULT:
        return UpstreamError(f"a replica answered {status} to the gateway", code="upstream_misconfigured")
    if status in FULL:
        return ReplicaFull(held_seconds=held_seconds)
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


def retry_after_seconds(headers: Mapping[bytes, bytes]) -> float | None:
    """How long a replica asks to be spared, if it says; RFC 9110's dates are as good as nothing."""
    try:
        seconds = float(headers.get(b"retry-after", b""))
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) and seconds > 0 else None


def _told(error: Any) -> tuple[str, str, str]:
    """Message, type and code of an error in any of the shapes that engines and proxies use."""
    if isinstance(error, dict):
        code = error.get("code")
        return str(error.get("message") or ""), str(error.get("type") or ""), "" if code is None else str(code)
    return ("" if error is None else str(error)), "", ""
