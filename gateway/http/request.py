"""One request as it came in: its head, then its body."""

from dataclasses import dataclass, field
from typing import Any

from gateway.errors import GatewayError


@dataclass(slots=True)
class Request:
    """A request of one client; header names are lower case, target and values are bytes as they came.

    With a `refusal` its body is not kept: whoever answers tells the client that, and nothing else.
    """

    method: bytes = b""
    target: bytes = b""
    headers: dict[bytes, bytes] = field(default_factory=dict)
    supports_chunked: bool = True  # the client reads chunked bodies: HTTP/1.1
    keep_alive: bool = False
    body: bytes = b""
    reserved_bytes: int = 0  # that its body takes in the front's account
    refusal: GatewayError | None = None
    request_id: str = ""
    caller: Any = None  # whom the handler took the client for

    @property
    def path(self) -> bytes:
        """The target without its query, not decoded: routes are matched on what came."""
        return self.target.partition(b"?")[0]
