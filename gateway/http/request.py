"""One HTTP request as received from a client."""

from typing import Any, Protocol

from gateway.errors import GatewayError


class Slot(Protocol):
    """What a request occupies from its head to the end of its answer, besides memory."""

    def release(self) -> None:
        """Free it; idempotent."""


class Request:
    """Head and body of a request. Header names are lower case; target and header values are the received bytes.

    `path` is the target without its query, not percent-decoded: routes match the received bytes. If `refusal` is set,
    the body is empty and the handler must respond with that error only.
    """

    __slots__ = (
        "body",
        "caller",
        "endpoint",
        "headers",
        "keep_alive",
        "method",
        "owner",
        "refusal",
        "request_id",
        "reserved_bytes",
        "slot",
        "supports_chunked",
        "target",
    )

    def __init__(self, headers: dict[bytes, bytes] | None = None) -> None:
        self.headers = {} if headers is None else headers
        self.method = self.target = self.body = b""
        self.supports_chunked = True  # HTTP/1.1: the client accepts a chunked response
        self.keep_alive = False
        self.reserved_bytes = 0  # what this request holds of the server's memory for bodies
        self.owner = ""  # whose share of that memory it uses, "" for none; set by the handler's `admit`
        self.slot: Slot | None = None  # set by the handler's `admit`
        self.refusal: GatewayError | None = None
        self.request_id = ""  # set by the handler
        self.caller: Any = None  # the authenticated caller; set by the handler's `admit`
        self.endpoint: Any = None  # what handles its path; set by the handler's `admit` if the request is admitted

    @property
    def path(self) -> bytes:
        """The target without its query."""
        target = self.target
        return target.partition(b"?")[0] if b"?" in target else target
