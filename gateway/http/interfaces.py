"""What a client's connection needs of the front that it belongs to."""

from dataclasses import dataclass
from typing import Protocol

from gateway.http.request import Request
from gateway.http.response_writer import DateHeader, ResponseWriter


@dataclass(frozen=True, slots=True)
class ClientTimeouts:
    """How long a client may take; looked at every quarter of the shortest."""

    head_seconds: float = 10.0
    body_silence_seconds: float = 30.0
    keep_alive_seconds: float = 75.0
    slow_reader_seconds: float = 60.0
    linger_seconds: float = 2.0  # of silence, after a refusal
    linger_total_seconds: float = 30.0

    @property
    def tick_seconds(self) -> float:
        """How often a connection looks at its deadline."""
        return min(self.head_seconds, self.body_silence_seconds, self.keep_alive_seconds, self.linger_seconds) / 4


class RequestHandler(Protocol):
    """What answers requests."""

    def admit(self, request: Request) -> int:
        """Look at a head, before the body is read: the longest body that it may have; GatewayError refuses it."""

    async def handle(self, request: Request, reply: ResponseWriter) -> None:
        """Answer, or tell the request's refusal."""

    def on_internal_error(self, request: Request, reply: ResponseWriter) -> None:
        """Tell a client that the gateway itself has failed."""


class ServerConnection(Protocol):
    """A connection, as a front sees it."""

    @property
    def busy(self) -> bool:
        """Tell whether a request is being answered."""

    def cancel(self) -> None:
        """End the request that is being answered."""

    def close(self) -> None:
        """Close, at once if the client doesn't read."""


class ServerContext(Protocol):
    """A front, as a connection sees it."""

    timeouts: ClientTimeouts
    clock: DateHeader
    handler: RequestHandler
    draining: bool

    def on_client_aborted(self, reason: str) -> None:
        """A client was cut off."""

    def reserve(self, request: Request, size_bytes: int) -> bool:
        """Take memory for a piece of a request's body, if there is some left."""

    def release(self, request: Request) -> None:
        """Give back what a request holds."""

    def register(self, connection: ServerConnection) -> None:
        """Count a connection in."""

    def unregister(self, connection: ServerConnection) -> None:
        """Count it out."""

    def notify_idle(self) -> None:
        """A request has ended."""
