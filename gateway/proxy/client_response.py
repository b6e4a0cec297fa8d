"""The response to one client: an answer, whole or streamed; an error as a status, or inside a stream that has begun."""

import asyncio
from collections.abc import Callable, Sequence

from gateway.errors import GatewayError
from gateway.http.response_writer import ResponseWriter, header_lines
from gateway.openai.endpoints import Endpoint
from gateway.openai.sse import KEEP_ALIVE, error_event
from gateway.proxy.stats import RequestStats
from gateway.routing.pick import Candidate

JSON = b"content-type: application/json\r\n"
# The last one is for nginx, which otherwise keeps a stream back until its buffers are full or it ends.
EVENTS = b"content-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\nx-accel-buffering: no\r\n"
MAX_ROUTING_HEADERS = 10_000

Headers = Sequence[tuple[bytes, bytes]]
LimitHeaders = Callable[[float, int], Headers]


class RoutingHeaders:
    """The header lines that name the replica and the reason, encoded once for each pair of them."""

    __slots__ = ("_lines",)

    def __init__(self) -> None:
        self._lines: dict[tuple[str, str, str], bytes] = {}

    def lines(self, candidate: Candidate) -> bytes:
        """The lines of a candidate."""
        key = (candidate.replica.id, candidate.variant.name, candidate.reason)
        return self._lines.get(key) or self._encode(key, candidate)

    def _encode(self, key: tuple[str, str, str], candidate: Candidate) -> bytes:
        if len(self._lines) >= MAX_ROUTING_HEADERS:
            self._lines.clear()  # replicas come and go; those that are there are encoded again
        lines = header_lines(
            (
                (b"x-quantgate-variant", candidate.variant.name.encode()),
                (b"x-quantgate-precision", candidate.variant.precision.encode()),
                (b"x-quantgate-replica", candidate.replica.id.encode()),
                (b"x-quantgate-reason", candidate.reason.encode()),
            )
        )
        return self._lines.setdefault(key, lines)


class ClientResponse:
    """Implements Sink for one client.

    Between `keep_alive` and the first event, a stream that waits is kept open with comments. A client that has received
    comments only has received no part of an answer: another replica may still be tried. `close` must be called at last.
    """

    __slots__ = ("_endpoint", "_heartbeat_seconds", "_limit_headers", "_routing_headers", "_stats", "_timer", "_writer")

    def __init__(
        self,
        endpoint: Endpoint,
        stats: RequestStats,
        writer: ResponseWriter,
        routing_headers: RoutingHeaders,
        limit_headers: LimitHeaders | None,
    ) -> None:
        self._endpoint = endpoint
        self._stats = stats
        self._writer = writer
        self._routing_headers = routing_headers
        # What the client's key has left at a time, after the tokens of this answer; None: it has no limits.
        self._limit_headers = limit_headers
        self._heartbeat_seconds = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def close(self) -> None:
        """Stop the heartbeat."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def keep_alive(self, every_seconds: float) -> None:
        """Send a comment this often until the first event; 0: never."""
        self.close()
        self._heartbeat_seconds = every_seconds
        if every_seconds:
            self._timer = asyncio.get_running_loop().call_later(every_seconds, self._heartbeat)

    def send(self, body: bytes) -> None:
        """Send a whole answer."""
        self._stats.started = True
        self._writer.send(200, self._head(JSON), body)

    def write(self, events: bytes) -> None:
        """Send events; the first ones start the stream."""
        if self._stats.started:
            self._writer.write(events)
            return
        self._stats.started = True
        self.close()
        if self._writer.started:
            # The status went out with a comment, so the routing headers follow in another one.
            self._writer.write(self._routing_comment() + events)
        else:
            self._writer.start(200, self._head(EVENTS), events)

    def end(self) -> None:
        """End a complete stream."""
        self._writer.end()

    @property
    def write_paused(self) -> bool:
        """Whether the client reads slower than the gateway writes."""
        return self._writer.write_paused

    async def drain(self) -> None:
        """Wait until the client has read enough; ClientDisconnected if that takes too long."""
        await self._writer.drain()

    @property
    def client_disconnected(self) -> bool:
        """Whether the client has left."""
        return self._writer.client_disconnected

    def refuse(self, error: GatewayError) -> None:
        """Send an error: as a response, or as the last event of a stream that has begun."""
        self.close()
        writer = self._writer
        if writer.ended:
            return
        if writer.started:
            writer.end(error_event(self._endpoint, error))
            return
        body = error.anthropic_body() if self._endpoint.errors == "anthropic" else error.body()
        writer.send(error.status, self._head(JSON + header_lines(error.headers())), body)

    def _heartbeat(self) -> None:
        if not self._writer.started:
            # The replica that is asked now may not be the one that answers.
            self._writer.start(200, self._head(EVENTS, routed=False))
        self._writer.write(KEEP_ALIVE)
        self._stats.metrics.heartbeats.inc()
        self._timer = asyncio.get_running_loop().call_later(self._heartbeat_seconds, self._heartbeat)

    def _head(self, first: bytes, *, routed: bool = True) -> bytes:
        """The header lines of a response, with the request id, limits and routing headers."""
        stats = self._stats
        request_id = stats.request_id.encode()
        lines = b"%bx-request-id: %b\r\n" % (first, request_id)
        if self._endpoint.errors == "anthropic":
            lines += b"request-id: %b\r\n" % request_id
        if self._limit_headers is not None and (limits := self._limit_headers(stats.clock(), stats.tokens)):
            lines += header_lines(limits)
        candidate = stats.candidate
        if not routed or candidate is None:
            return lines
        return b"%b%bx-quantgate-attempts: %d\r\n" % (lines, self._routing_headers.lines(candidate), stats.attempts)

    def _routing_comment(self) -> bytes:
        candidate = self._stats.candidate
        assert candidate is not None
        lines = self._routing_headers.lines(candidate)
        fields = lines.replace(b"\r\n", b" ").replace(b"x-quantgate-", b"").replace(b": ", b"=")
        return b": quantgate %battempts=%d\n\n" % (fields, self._stats.attempts)
