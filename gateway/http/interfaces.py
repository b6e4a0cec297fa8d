"""Protocols and settings that the parts of the HTTP server share: server, connection, request handler."""

from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Protocol

from gateway.http.request import Request
from gateway.http.response_writer import DateHeader, ResponseWriter


@dataclass(frozen=True, slots=True)
class ClientTimeouts:
    """How long a client may take; a connection checks its deadline every `tick_seconds`."""

    head_seconds: float = 10.0  # request line and headers, from the first byte
    body_silence_seconds: float = 30.0  # between two pieces of a body
    body_seconds: float = 600.0  # in all for a body
    body_bytes_per_second: float = 4096.0  # least rate; a body may be `body_silence_seconds` behind it
    keep_alive_seconds: float = 75.0  # idle before the first and between two requests
    slow_reader_seconds: float = 60.0  # until a client with a full write buffer reads on
    linger_seconds: float = 2.0  # without new bytes of a refused request, after the response
    linger_total_seconds: float = 30.0  # in all for the rest of a refused request, after the response

    @property
    def tick_seconds(self) -> float:
        """Interval at which a connection checks its deadline: a quarter of the shortest one."""
        return min(self.head_seconds, self.body_silence_seconds, self.keep_alive_seconds, self.linger_seconds) / 4

    def body_deadline(self, deadline: float, size_bytes: int, now: float, until: float) -> float:
        """Extend the deadline of a body by the time that a piece takes at the least rate, and no further than `until`.

        A body that is faster cannot save up more than the time that it may be silent.
        """
        earned_until = deadline + size_bytes / self.body_bytes_per_second
        return min(now + self.body_silence_seconds, earned_until, until)


class RequestHandler(Protocol):
    """Application behind the server. One instance serves all connections."""

    def admit(self, request: Request) -> int:
        """Check the head before the body is read; returns the limit of the body in bytes.

        A GatewayError becomes the request's `refusal`.
        """

    def handle(self, request: Request, response: ResponseWriter) -> Awaitable[None]:
        """Send the whole response, or the error in `request.refusal`; cancelled when the client disconnects."""

    def on_internal_error(self, request: Request, response: ResponseWriter) -> None:
        """Send a 500 if nothing was sent yet; called when `handle` raised an unexpected exception."""


class ServerConnection(Protocol):
    """One client connection, as the server uses it while it drains."""

    @property
    def busy(self) -> bool:
        """Whether a request is being answered."""

    def cancel(self) -> None:
        """Cancel the request that is being answered."""

    def close(self) -> None:
        """Close the connection; abort it if unsent bytes are buffered."""

    def expire_earlier(self, seconds: float) -> None:
        """Let it be idle for that much less, if it is idle."""


class ServerContext(Protocol):
    """The server, as its connections use it."""

    timeouts: ClientTimeouts
    keep_alive_seconds: float  # that of `timeouts`, or less while the server shuts down
    date_header: DateHeader
    handler: RequestHandler
    draining: bool  # responses close their connections

    def on_client_aborted(self, reason: str) -> None:
        """Count a client that the server disconnected; `reason` is a metric label."""

    def reserve(self, request: Request, size_bytes: int) -> bool:
        """Reserve memory for a piece of a request's body; False if none is left."""

    def release(self, request: Request) -> None:
        """Return all memory that a request has reserved, and its slot."""

    def register(self, connection: ServerConnection) -> None:
        """Add an open connection."""

    def unregister(self, connection: ServerConnection) -> None:
        """Remove a closed connection."""

    def notify_idle(self) -> None:
        """Wake up a waiting drain; called whenever a connection has finished a request."""
