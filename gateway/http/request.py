"""One HTTP request as received from a client."""

from typing import Any

from gateway.errors import GatewayError


class Request:
    """Head and body of a request. Header names are lower case; target and header values are the received bytes.

    `path` is the target without its query, not percent-decoded: routes match the received bytes. If `refusal` is set,
    the body is empty and the handler must respond with that error only.
    """

    # Defaults of the class, so that a request costs one assignment.
    method: bytes = b""
    target: bytes = b""
    supports_chunked: bool = True  # HTTP/1.1: the client accepts a chunked response
    keep_alive: bool = False
    body: bytes = b""
    reserved_bytes: int = 0  # what this request holds of the server's memory for bodies
    refusal: GatewayError | None = None
    request_id: str = ""  # set by the handler
    caller: Any = None  # the authenticated caller; set by the handler's `admit`

    def __init__(self, headers: dict[bytes, bytes] | None = None) -> None:
        self.headers = {} if headers is None else headers

    @property
    def path(self) -> bytes:
        """The target without its query."""
        target = self.target
        return target.partition(b"?")[0] if b"?" in target else target
