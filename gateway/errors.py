"""The errors that the gateway answers with, instead of passing on a reply; each has a status and OpenAI's shape.

GatewayError
├── RequestError              400  the client can fix it
│   ├── InvalidKey            401
│   ├── NotAllowed            403  the key does not permit it
│   ├── UnknownModel          404
│   ├── ToolsUnsupported      400  no replica of the model reads calls of tools
│   ├── RequestTooSlow        408  the request did not arrive in time
│   ├── BodyTooLarge          413
│   ├── UnsupportedEncoding   415
│   └── HeadTooLarge          431
├── Unavailable               503  worth another try later
│   ├── Draining              503  this gateway is about to stop
│   ├── KeysUnavailable       503  the API keys in the state database were never read
│   └── FloorUnmet            503  no variant that is good enough can answer
├── Overloaded                429  more requests than can be answered in time
│   ├── QueueFull             429  too many requests wait
│   ├── QueueTimeout          429  no replica had room in time
│   ├── ReplicaFull           429  a replica has no room; another may have
│   └── RateLimited           429  more than the key may send
└── UpstreamError             502  a replica failed; another may be tried while nothing was sent
    ├── EngineError           502  its engine replied with a 5xx to this request
    ├── UpstreamUnreachable   502  no connection
    ├── UpstreamDisconnected  502  it closed the connection in the middle
    └── UpstreamTimeout       504  it sent nothing for too long
        └── ReplicaHung       504  it sends nothing to anybody, nor its metrics

`metric_reason` is the label under which `quantgate_rejections_total` counts a request that no replica saw.
"""

import json
import math

import msgspec

# What msgspec raises for invalid JSON: malformed, not UTF-8, nested too deeply.
INVALID_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

# The OpenAI SDK ignores a longer Retry-After, and stops retrying.
MAX_RETRY_AFTER_SECONDS = 120

# https://docs.anthropic.com/en/api/errors
ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}

# The OpenAI SDK obeys this header for any status.
NO_RETRY = (b"x-should-retry", b"false")


class GatewayError(Exception):
    """An error reply; `param` names the field of the request at fault."""

    metric_reason = "other"
    status = 500
    type = "server_error"
    code = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or type(self).code

    def body(self) -> bytes:
        """Render in OpenAI's error shape."""
        return error_body(self.message, self.type, self.param, self.code)

    @property
    def anthropic_type(self) -> str:
        """The type in Anthropic's errors, which follows from the status."""
        return ANTHROPIC_TYPES.get(self.status, "api_error" if self.status >= 500 else "invalid_request_error")

    def anthropic_body(self) -> bytes:
        """Render in Anthropic's error shape; its SDK uses the status, the code is for people."""
        error = {"type": self.anthropic_type, "message": self.message, "code": self.code}
        return json.dumps({"type": "error", "error": error}, ensure_ascii=False).encode()

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Headers that say whether and when to retry."""
        return []


class RequestError(GatewayError):
    """The request is invalid."""

    metric_reason = "invalid_request"
    status = 400
    type = "invalid_request_error"
    code = "invalid_request"


class InvalidKey(RequestError):
    """The API key is missing, unknown or expired."""

    metric_reason = "invalid_key"
    status = 401
    type = "authentication_error"
    code = "invalid_api_key"

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Name the scheme, as RFC 9110, 11.6.1 requires of a 401."""
        return [(b"www-authenticate", b"Bearer")]


class NotAllowed(RequestError):
    """The API key is valid, but does not permit the request."""

    metric_reason = "not_allowed"
    status = 403
    type = "permission_error"
    code = "model_not_allowed"


class UnknownModel(RequestError):
    """No alias or variant has this name."""

    metric_reason = "unknown_model"
    status = 404
    code = "model_not_found"


class ToolsUnsupported(RequestError):
    """No replica that may answer takes requests with tools."""

    code = "tools_unsupported"

    def __init__(self, model: str) -> None:
        super().__init__(
            f"'tools' is not supported by {model[:100]!r}: none of its replicas runs with a tool parser; send no tools "
            "or have the option tool_calling of its replicas set to a tool parser of vLLM",
            param="tools",
        )


class RequestTooSlow(RequestError):
    """The rest of a request did not arrive in time."""

    metric_reason = "too_slow"
    status = 408
    code = "request_timeout"

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Keep SDKs from retrying, which they do after any 408."""
        return [NO_RETRY]


class BodyTooLarge(RequestError):
    """The body exceeds the configured limit."""

    metric_reason = "too_large"
    status = 413
    code = "request_too_large"


class UnsupportedEncoding(RequestError):
    """The body is compressed in a way that the gateway does not decompress."""

    status = 415
    code = "unsupported_content_encoding"

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Name the encoding that is supported, as RFC 9110, 15.5.16 recommends."""
        return [(b"accept-encoding", b"gzip")]


class HeadTooLarge(RequestError):
    """The request line and headers exceed their limits."""

    metric_reason = "too_large"
    status = 431
    code = "headers_too_large"


class Unavailable(GatewayError):
    """No replica can answer now."""

    metric_reason = "no_replica"
    status = 503
    type = "service_unavailable"
    code = "no_ready_replica"

    def __init__(self, message: str, *, code: str | None = None, retry_after_seconds: float = 5) -> None:
        super().__init__(message, code=code)
        self.retry_after_seconds = retry_after_seconds

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Say when to retry."""
        return retry_after(self.retry_after_seconds)


class Draining(Unavailable):
    """The gateway is about to stop and accepts no new requests."""

    metric_reason = "draining"
    code = "draining"


class KeysUnavailable(Unavailable):
    """The state database has been away since the start, so nobody can be authenticated."""

    metric_reason = "keys_unavailable"
    code = "keys_unavailable"


class Overloaded(GatewayError):
    """More requests than can be answered in time; `retry_after_seconds` is when a retry is expected to succeed."""

    status = 429
    type = "rate_limit_error"
    code = "overloaded"

    def __init__(self, message: str, *, retry_after_seconds: float, code: str | None = None) -> None:
        super().__init__(message, code=code)
        self.retry_after_seconds = retry_after_seconds

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Say when to retry."""
        return retry_after(self.retry_after_seconds)


class QueueFull(Overloaded):
    """Too many requests wait already, or the API key has more than its share of them."""

    metric_reason = code = "queue_full"


class QueueTimeout(Overloaded):
    """A request waited as long as it may."""

    metric_reason = code = "queue_timeout"


class ReplicaFull(Overloaded):
    """A replica refused a request for want of room, which does not count as a failure."""

    def __init__(self, *, backoff_seconds: float | None = None) -> None:
        super().__init__("every replica that may answer is busy", retry_after_seconds=backoff_seconds or 1)
        self.backoff_seconds = backoff_seconds  # the Retry-After of the replica


class RateLimited(Overloaded):
    """The API key has reached a limit; when it may send again is known exactly."""

    metric_reason = "rate_limit"
    code = "rate_limit_exceeded"

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Say when, however late that is; an SDK that retried earlier would be refused again."""
        if self.retry_after_seconds <= MAX_RETRY_AFTER_SECONDS:
            return retry_after(self.retry_after_seconds)
        return [(b"retry-after", str(math.ceil(self.retry_after_seconds)).encode()), NO_RETRY]


class FloorUnmet(Unavailable):
    """Every variant that could answer is below the quality floor."""

    metric_reason = "floor"
    code = "quality_floor_unmet"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Keep SDKs from retrying: the variants will not be better."""
        return [NO_RETRY]


class UpstreamError(GatewayError):
    """A replica failed."""

    status = 502
    type = "upstream_error"
    code = "upstream_error"

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Keep SDKs from retrying: every replica that may answer has been tried."""
        return [NO_RETRY]


class EngineError(UpstreamError):
    """A replica's engine replied with a 5xx; what it said may be meant for the operator only."""

    def __init__(self, engine_status: int, engine_message: str) -> None:
        super().__init__(f"a replica failed with status {engine_status}")
        self.engine_status = engine_status
        self.engine_message = engine_message

    def of_request(self, replicas: int) -> "EngineError":
        """The same error of so many replicas: it is about the request, so its client gets the engine's words."""
        error = EngineError(self.engine_status, self.engine_message)
        error.message = f"{replicas} replicas failed with status {self.engine_status}: {self.engine_message}"
        return error


class UpstreamUnreachable(UpstreamError):
    """A connection to a replica failed."""

    code = "upstream_unreachable"


class UpstreamDisconnected(UpstreamError):
    """A replica closed the connection before its reply was complete."""

    code = "upstream_disconnected"


class UpstreamTimeout(UpstreamError):
    """A replica sent nothing for too long."""

    status = 504
    code = "upstream_timeout"


class ReplicaHung(UpstreamTimeout):
    """A replica sends nothing any more: neither its metrics, nor a byte of any response."""


def retry_after(seconds: float) -> list[tuple[bytes, bytes]]:
    """Headers that make SDKs retry after a delay; with more than two minutes they would give up at once."""
    whole = min(max(1, math.ceil(seconds)), MAX_RETRY_AFTER_SECONDS)
    return [(b"retry-after", str(whole).encode()), (b"x-should-retry", b"true")]


def error_body(message: str, kind: str, param: str | None, code: str | None) -> bytes:
    """Encode `{"error": {...}}` as the OpenAI SDK reads it; the code is a string or null."""
    error = {"message": message, "type": kind, "param": param, "code": code}
    return json.dumps({"error": error}, ensure_ascii=False).encode()
