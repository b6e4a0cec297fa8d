"""What the gateway tells a client when it can't pass on an answer; each knows its status and OpenAI shape.

GatewayError
├── RequestError              400  the client can mend it
│   ├── InvalidKey            401
│   ├── UnknownModel          404
│   └── BodyTooLarge          413
├── Unavailable               503  worth another try later
│   └── FloorUnmet            503  no variant that is good enough can answer
└── UpstreamError             502  a replica failed; another one may be tried while nothing was sent
    ├── UpstreamUnreachable   502  no connection
    ├── UpstreamDisconnected  502  it closed in the middle
    └── UpstreamTimeout       504  it was silent for too long
"""

import json

import msgspec

# What msgspec raises for bytes that are no JSON: malformed, not UTF-8, nested too deeply.
NO_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

# The OpenAI SDK obeys this header for any status.
NO_RETRY = (b"x-should-retry", b"false")


class GatewayError(Exception):
    """An answer of our own; `param` names the field at fault."""

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

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Headers that tell the client whether and when to try again."""
        return []


class RequestError(GatewayError):
    """The request can't be answered as it is."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_request"


class InvalidKey(RequestError):
    """No key, or one that nobody gave out."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Name the scheme, as RFC 9110 asks of a 401."""
        return [(b"www-authenticate", b"Bearer")]


class UnknownModel(RequestError):
    """Neither an alias nor a variant has this name."""

    status = 404
    code = "model_not_found"


class BodyTooLarge(RequestError):
    """The body is longer than the configured limit."""

    status = 413
    code = "request_too_large"


class Unavailable(GatewayError):
    """No replica can answer now."""

    status = 503
    type = "service_unavailable"
    code = "no_ready_replica"
    retry_after_seconds = 5

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Say when another try makes sense."""
        return [(b"retry-after", str(self.retry_after_seconds).encode())]


class FloorUnmet(Unavailable):
    """What could answer is below the quality that was asked for."""

    code = "quality_floor_unmet"

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Keep the SDK from asking again: the same variants would be too bad again."""
        return [NO_RETRY]


class UpstreamError(GatewayError):
    """A replica failed."""

    status = 502
    type = "upstream_error"
    code = "upstream_error"

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Keep the SDK from asking again: every replica that may answer has been tried."""
        return [NO_RETRY]


class UpstreamUnreachable(UpstreamError):
    """A replica took no connection."""

    code = "upstream_unreachable"


class UpstreamDisconnected(UpstreamError):
    """A replica closed the connection before its answer was whole."""

    code = "upstream_disconnected"


class UpstreamTimeout(UpstreamError):
    """A replica said nothing for too long."""

    status = 504
    code = "upstream_timeout"


def error_body(message: str, kind: str, param: str | None, code: str | None) -> bytes:
    """Write `{"error": {...}}` the way the OpenAI SDK reads it; the code is a string or null."""
    error = {"message": message, "type": kind, "param": param, "code": code}
    return json.dumps({"error": error}, ensure_ascii=False).encode()
