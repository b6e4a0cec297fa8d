"""What the gateway tells a client when it can't pass on an answer; each knows its status and OpenAI shape.

GatewayError
├── RequestError              400  the client can mend it
│   ├── InvalidKey            401
│   ├── NotAllowed            403  its key doesn't reach so far
│   ├── UnknownModel          404
│   ├── RequestTooSlow        408  it took too long to arrive
│   ├── BodyTooLarge          413
│   └── HeadTooLarge          431
├── Unavailable               503  worth another try later
│   ├── Draining              503  this gateway is about to stop
│   └── FloorUnmet            503  no variant that is good enough can answer
├── Overloaded                429  more was asked than can be answered in time
│   ├── ReplicaFull           429  a replica has no room; another one may have
│   └── RateLimited           429  more than the key may ask
└── UpstreamError             502  a replica failed; another one may be tried while nothing was sent
    ├── UpstreamUnreachable   502  no connection
    ├── UpstreamDisconnected  502  it closed in the middle
    └── UpstreamTimeout       504  it was silent for too long
"""

import json
import math

import msgspec

# What msgspec raises for bytes that are no JSON: malformed, not UTF-8, nested too deeply.
NO_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

# The OpenAI SDK obeys no longer delay, and stops trying when it is told one.
LONGEST_RETRY_SECONDS = 120

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

    def anthropic_body(self) -> bytes:
        """Render in Anthropic's error shape, whose SDK goes by the status; the code is beside it for people."""
        kind = ANTHROPIC_TYPES.get(self.status, "api_error" if self.status >= 500 else "invalid_request_error")
        error = {"type": kind, "message": self.message, "code": self.code}
        return json.dumps({"type": "error", "error": error}, ensure_ascii=False).encode()

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


class NotAllowed(RequestError):
    """The key is known, and may not do this."""

    status = 403
    type = "permission_error"
    code = "model_not_allowed"


class UnknownModel(RequestError):
    """Neither an alias nor a variant has this name."""

    status = 404
    code = "model_not_found"


class RequestTooSlow(RequestError):
    """The rest of a request didn't arrive in time."""

    status = 408
    code = "request_timeout"

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Keep the SDK, which takes any 408 for worth another try, from sending it at the same pace."""
        return [NO_RETRY]


class BodyTooLarge(RequestError):
    """The body is longer than the configured limit."""

    status = 413
    code = "request_too_large"


class HeadTooLarge(RequestError):
    """Request line and headers are longer, or more, than any client needs."""

    status = 431
    code = "headers_too_large"


class Unavailable(GatewayError):
    """No replica can answer now."""

    status = 503
    type = "service_unavailable"
    code = "no_ready_replica"

    def __init__(self, message: str, *, code: str | None = None, retry_after_seconds: float = 5) -> None:
        super().__init__(message, code=code)
        self.retry_after_seconds = retry_after_seconds

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Say when another try makes sense."""
        return retry_after(self.retry_after_seconds)


class Draining(Unavailable):
    """No new requests here: the gateway is about to stop, and another one or its successor takes them."""

    code = "draining"


class Overloaded(GatewayError):
    """More is asked than can be answered in time; `retry_after_seconds` is when it is expected to be otherwise."""

    status = 429
    type = "rate_limit_error"
    code = "overloaded"

    def __init__(self, message: str, *, retry_after_seconds: float, code: str | None = None) -> None:
        super().__init__(message, code=code)
        self.retry_after_seconds = retry_after_seconds

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Say when another try makes sense."""
        return retry_after(self.retry_after_seconds)


class ReplicaFull(Overloaded):
    """A replica took a request for one too many; that is no failure of it."""

    def __init__(self, *, held_seconds: float | None = None) -> None:
        super().__init__("every replica that may answer is busy", retry_after_seconds=held_seconds or 1)
        self.held_seconds = held_seconds  # what the replica itself asked for


class RateLimited(Overloaded):
    """The key has used up what it may ask for now."""

    code = "rate_limit_exceeded"


class FloorUnmet(Unavailable):
    """What could answer is below the quality that was asked for."""

    code = "quality_floor_unmet"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param

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


def retry_after(seconds: float) -> list[tuple[bytes, bytes]]:
    """Headers that make an SDK try again after so many seconds; beyond two minutes it would give up at once."""
    whole = min(max(1, math.ceil(seconds)), LONGEST_RETRY_SECONDS)
    return [(b"retry-after", str(whole).encode()), (b"x-should-retry", b"true")]


def error_body(message: str, kind: str, param: str | None, code: str | None) -> bytes:
    """Write `{"error": {...}}` the way the OpenAI SDK reads it; the code is a string or null."""
    error = {"message": message, "type": kind, "param": param, "code": code}
    return json.dumps({"error": error}, ensure_ascii=False).encode()
