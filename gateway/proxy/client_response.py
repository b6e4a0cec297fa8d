"""The response to one client: an answer, whole or streamed; an error as a status, or inside a stream that has begun."""

import asyncio
from collections.abc import Callable, Sequence

from gateway.errors import GatewayError
from gateway.http.response_writer import ResponseWriter, header_lines
from gateway.openai.endpoints import Endpoint
from gateway.openai.openers import announced_response, announcement, failed_response, heartbeat
from gateway.openai.sse import error_event
from gateway.proxy.stats import RequestStats
from gateway.routing.pick import Candidate

JSON = b"content-type: application/json\r\n"
# The last one is for nginx, which otherwise keeps a stream back until its buffers are full or it ends.
EVENTS = b"content-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\nx-accel-buffering: no\r\n"
MAX_ROUTING_HEADERS = 10_000
# More openers than any engine sends, unless it sends comments for hours: they go out like content.
MAX_HELD_BYTES = 4 * 2**20

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

    From `keep_alive` to the end, a stream in which nothing was sent for a while is kept open with a heartbeat. A client
    that has received heartbeats and openers only has received no part of an answer: another replica may still be tried.
    `close` must be called at last.
    """

    __slots__ = (
        "_beat_at",
        "_endpoint",
        "_heartbeat_seconds",
        "_held",
        "_limit_headers",
        "_opened",
        "_routing_headers",
        "_stats",
        "_timer",
        "_writer",
    )

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
        self._held = b""  # openers that the client has not got
        self._opened = b""  # those that it has
        self._heartbeat_seconds = 0.0
        self._beat_at = 0.0  # the last heartbeat
        self._timer: asyncio.TimerHandle | None = None

    def close(self) -> None:
        """Stop the heartbeat."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def keep_alive(self, every_seconds: float) -> None:
        """Send a heartbeat whenever nothing was sent for so long; 0: never."""
        self.close()
        self._heartbeat_seconds = every_seconds
        if every_seconds:
            self._timer = asyncio.get_running_loop().call_later(every_seconds, self._on_timer)

    def send(self, body: bytes) -> None:
        """Send a whole answer."""
        self._stats.started = True
        self._writer.send(200, self._head(JSON), body)

    def begin(self) -> str | None:
        """Forget the openers of an earlier attempt; returns the id of a response that was announced all the same."""
        self._held = b""
        return announced_response(self._opened).get("id") if self._opened else None

    def hold(self, openers: bytes) -> None:
        """Keep openers until there is content, or too many of them."""
        if self._stats.started:
            self._writer.write(openers)
            return
        self._held += openers
        if len(self._held) > MAX_HELD_BYTES:
            self.write(b"")

    def write(self, events: bytes) -> None:
        """Send events; the first ones start the stream, behind the openers."""
        if self._stats.started:
            self._writer.write(events)
            return
        self._stats.started = True
        events, self._held = self._held + events, b""
        if self._endpoint.keeps_answers:
            self._opened += events  # the response object is in them
        if self._writer.started:
            # The status went out with a heartbeat, so the routing headers follow in a comment.
            self._writer.write(self._routing_comment() + events)
        else:
            self._writer.start(200, self._head(EVENTS), events)

    def end(self) -> None:
        """End a complete stream."""
        self.close()
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
            writer.end(self._error_events(error))
            return
        body = error.anthropic_body() if self._endpoint.errors == "anthropic" else error.body()
        writer.send(error.status, self._head(JSON + header_lines(error.headers())), body)

    def _error_events(self, error: GatewayError) -> bytes:
        event = error_event(self._endpoint, error)
        if not self._endpoint.keeps_answers:
            return event
        stats = self._stats
        minimal = {
            "id": f"resp_{stats.request_id}",
            "object": "response",
            "created_at": int(stats.wall_clock()),
            "model": stats.alias,
            "output": [],
        }
        return event + failed_response(error, announced_response(self._opened) or minimal)

    def _on_timer(self) -> None:
        """Send a heartbeat if it is due. Tokens note when they were sent, so none of them has to set the timer."""
        stats, every_seconds = self._stats, self._heartbeat_seconds
        now = stats.clock()
        left_seconds = max(stats.last_event_at, self._beat_at) + every_seconds - now
        if left_seconds <= 0:
            left_seconds = every_seconds
            # Behind the end nothing may follow, and what a client doesn't read keeps no connection open.
            if not stats.complete and not self._writer.write_paused:
                self._beat_at = now
                self._heartbeat()
        self._timer = asyncio.get_running_loop().call_later(left_seconds, self._on_timer)

    def _heartbeat(self) -> None:
        if not self._writer.started:
            # The replica that is asked now may not be the one that answers.
            self._writer.start(200, self._head(EVENTS, routed=False))
        events = b""
        if self._endpoint.keeps_answers and self._held:
            events, self._held = announcement(self._held)
            self._opened += events
        self._writer.write(events or heartbeat(self._endpoint, self._opened))
        self._stats.metrics.heartbeats.inc()

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
