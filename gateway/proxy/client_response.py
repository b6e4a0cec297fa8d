"""What one client is told: an answer, whole or as a stream; an error as a status, or inside a stream that has begun."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Self

from gateway.errors import GatewayError
from gateway.http.response_writer import ResponseWriter, header_lines
from gateway.openai.endpoints import Endpoint
from gateway.openai.sse import KEEP_ALIVE, error_event
from gateway.proxy.stats import RequestStats
from gateway.routing.pick import Choice

JSON = b"content-type: application/json\r\n"
EVENTS = b"content-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\n"
MOST_DISCLOSURES = 10_000

Headers = Sequence[tuple[bytes, bytes]]


class RoutingHeaders:
    """Header lines that say who answers and why, made once for each replica and reason."""

    __slots__ = ("_lines",)

    def __init__(self) -> None:
        self._lines: dict[tuple[str, str, str], bytes] = {}

    def of(self, choice: Choice) -> bytes:
        """The lines of a choice."""
        key = (choice.replica.id, choice.variant.name, choice.reason)
        return self._lines.get(key) or self._made(key, choice)

    def _made(self, key: tuple[str, str, str], choice: Choice) -> bytes:
        if len(self._lines) >= MOST_DISCLOSURES:
            self._lines.clear()  # Replicas come and go; those that are there are made again.
        lines = header_lines(
            (
                (b"x-quantgate-variant", choice.variant.name.encode()),
                (b"x-quantgate-precision", choice.variant.precision.encode()),
                (b"x-quantgate-replica", choice.replica.id.encode()),
                (b"x-quantgate-reason", choice.reason.encode()),
            )
        )
        return self._lines.setdefault(key, lines)


class ClientResponse:
    """Tells one client; a stream that waits is kept alive with comments while the `with` block runs.

    A client that has had comments only has been told nothing yet: another replica may still be tried.
    """

    __slots__ = ("_account", "_beat", "_disclosures", "_endpoint", "_heartbeat_seconds", "_limits", "_reply")

    def __init__(
        self,
        endpoint: Endpoint,
        account: RequestStats,
        reply: ResponseWriter,
        disclosures: RoutingHeaders,
        limits: Callable[[float], Headers],
    ) -> None:
        self._endpoint = endpoint
        self._account = account
        self._reply = reply
        self._disclosures = disclosures
        self._limits = limits  # what the client's key has left at a time, as headers
        self._heartbeat_seconds = 0.0
        self._beat: asyncio.TimerHandle | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._still()

    def keep_alive(self, every_seconds: float) -> None:
        """Send a comment so often until the first event comes; 0 is never."""
        self._still()
        self._heartbeat_seconds = every_seconds
        if every_seconds:
            self._beat = asyncio.get_running_loop().call_later(every_seconds, self._heartbeat)

    def whole(self, body: bytes) -> None:
        """Answer at once."""
        self._account.started = True
        self._reply.send(200, self._head(JSON), body)

    def event(self, data: bytes) -> None:
        """Go on with a stream, which begins with its first event."""
        if self._account.started:
            self._reply.write(data)
        elif self._reply.started:
            # The status went out with a comment, so who answers is told in another one.
            self._account.started = True
            self._still()
            self._reply.write(self._disclosure_comment() + data)
        else:
            self._account.started = True
            self._still()
            self._reply.start(200, self._head(EVENTS), data)

    def end(self) -> None:
        """End a stream that has told all."""
        self._reply.end()

    @property
    def write_paused(self) -> bool:
        """Tell whether the client reads slower than it is told."""
        return self._reply.write_paused

    async def drain(self) -> None:
        """Wait until the client has read enough; ClientLeft if it doesn't in time."""
        await self._reply.drain()

    def refuse(self, error: GatewayError) -> None:
        """Tell an error, in whatever way is left."""
        self._still()
        if self._reply.ended:
            return
        if self._reply.started:
            self._reply.end(error_event(self._endpoint, error))
            return
        body = error.anthropic_body() if self._endpoint.errors == "anthropic" else error.body()
        self._reply.send(error.status, self._head(JSON + header_lines(error.headers())), body)

    def _heartbeat(self) -> None:
        if not self._reply.started:
            # Whoever is asked now may not be who answers.
            self._reply.start(200, self._head(EVENTS, chosen=False))
        self._reply.write(KEEP_ALIVE)
        self._account.metrics.heartbeats.inc()
        self._beat = asyncio.get_running_loop().call_later(self._heartbeat_seconds, self._heartbeat)

    def _still(self) -> None:
        if self._beat is not None:
            self._beat.cancel()
            self._beat = None

    def _head(self, first: bytes, *, chosen: bool = True) -> bytes:
        """The request's id, and who answers and why: nobody is sent to a quantized copy without being told."""
        account = self._account
        request_id = account.request_id.encode()
        named = b"x-request-id: %b\r\n" % request_id
        if self._endpoint.errors == "anthropic":
            named += b"request-id: %b\r\n" % request_id
        if limits := self._limits(account.clock()):
            named += header_lines(limits)
        if chosen and account.choice is not None:
            named += b"%bx-quantgate-attempts: %d\r\n" % (self._disclosures.of(account.choice), account.attempts)
        return first + named

    def _disclosure_comment(self) -> bytes:
        choice = self._account.choice
        assert choice is not None
        told = self._disclosures.of(choice).replace(b"\r\n", b" ").replace(b"x-quantgate-", b"").replace(b": ", b"=")
        return b": quantgate %battempts=%d\n\n" % (told, self._account.attempts)
