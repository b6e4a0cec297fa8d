"""One HTTP/1.1 connection to a replica: an asyncio protocol over httptools' parser.

Here, as in gateway.front, own code stands where a library would do: on one machine a gateway of nothing else took
2,400 us of CPU per request with httpx, 200-300 us with aiohttp, and 54-67 us like this. RFC 9112 is the wire format.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import httptools

from gateway.errors import UpstreamDisconnected, UpstreamTimeout
from gateway.proxy.upstream.timer import ReplyTimer, Timeouts

HIGH_WATER_BYTES = 256 * 1024
HEADER_LIMIT_BYTES = 64 * 1024
NOT_MODIFIED_OR_EMPTY = frozenset({204, 304})


@dataclass(slots=True)
class ResponseHead:
    """Status and headers of a reply; header names are lower case."""

    status: int = 0
    headers: dict[bytes, bytes] = field(default_factory=dict)

    @property
    def streams(self) -> bool:
        """Tell whether the body is a stream of server-sent events."""
        return self.headers.get(b"content-type", b"").lower().startswith(b"text/event-stream")

    @property
    def delimited(self) -> bool:
        """Tell whether the reply says where it ends; otherwise the end of the connection is its end."""
        return (
            b"content-length" in self.headers
            or b"chunked" in self.headers.get(b"transfer-encoding", b"").lower()
            or self.status in NOT_MODIFIED_OR_EMPTY
        )


class Connection(asyncio.Protocol):
    """One request at a time: `send`, then `more` until it is empty; `reusable` tells whether another may follow.

    Every wait ends: with data, with UpstreamDisconnected, or with UpstreamTimeout when a deadline has passed.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._watch = ReplyTimer(self._loop, self._time_out)
        self._transport: asyncio.Transport  # from `connection_made` on, which comes before anything else
        self._parser = httptools.HttpResponseParser(self)
        self._head = ResponseHead()
        self._headers_bytes = 0
        self._headers_complete = False
        self._complete = True
        self._keep_alive = True
        self._failure: Exception | None = None
        self._body: list[bytes] = []
        self._sink: Callable[[bytes], bool] | None = None
        self._refusal: Exception | None = None  # what a sink raised
        self._body_bytes = 0
        self._waiter: asyncio.Future[None] | None = None
        self.received_bytes = 0
        self._body_seen_bytes = 0  # of those received, up to the last one of a body

    # What the caller does

    def send(self, request: bytes, deadlines: Timeouts) -> None:
        """Write a whole request; the reply starts from nothing."""
        self._head, self._headers_bytes, self._headers_complete = ResponseHead(), 0, False
        self._complete, self._keep_alive, self.received_bytes = False, False, 0
        self._body_seen_bytes, self._refusal = 0, None
        self._watch.begin(deadlines)
        self._transport.write(request)

    async def head(self) -> ResponseHead:
        """Wait for status and headers."""
        while not self._headers_complete:
            await self._wait()
        return self._head

    async def more(self) -> bytes:
        """Wait for more of the body, joined where several pieces arrived at once; b"" at its end."""
        while not self._body:
            if self._complete:
                return b""
            await self._wait()
        return self._taken()

    async def flow(self, sink: Callable[[bytes], bool]) -> bool:
        """Pour the body into a sink, each piece in the very step in which it arrives; True at its end.

        False: the sink said so, for it is full. Then nothing is poured until this is called again. What a sink raises
        comes out here. To wake a task for every piece costs more CPU (tests/benchmarks/RESULTS.md, Bare protocols).
        """
        while True:
            if self._body and not self._pour(sink):
                return False
            if self._complete:
                return True
            self._sink = sink
            try:
                await self._wait()
            finally:
                full, self._sink = self._sink is None, None
            if self._refusal is not None:
                refusal, self._refusal = self._refusal, None
                raise refusal
            if full:
                return False

    async def read(self, limit_bytes: int) -> bytes:
        """Read the whole body; UpstreamDisconnected if it is longer than the limit."""
        parts, size = [], 0
        while chunk := await self.more():
            parts.append(chunk)
            size += len(chunk)
            if size > limit_bytes:
                raise UpstreamDisconnected(f"a replica's answer is longer than {limit_bytes} bytes")
        return b"".join(parts)

    @property
    def reusable(self) -> bool:
        """Tell whether the reply is whole and read, and the server keeps the connection open."""
        return self._complete and self._keep_alive and not self._body and self._failure is None

    def close(self) -> None:
        """Close at once; to the replica this is a client that left, so it stops generating."""
        self._watch.stop()
        self._transport.abort()

    # What the transport does

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are not subclasses of asyncio's, they only behave like them.
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self.received_bytes += len(data)
        if self._complete:
            # Nobody asked: whatever this is, the connection is no longer in step.
            self._break_off("a replica sent bytes that nobody asked for")
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._break_off(f"a replica's answer is no HTTP: {error}")
        if self.received_bytes - self._body_seen_bytes > HEADER_LIMIT_BYTES:
            # One header or trailer without an end never reaches `on_header`.
            self._break_off("the headers of a replica's answer have no end")
        if self._sink is not None and self._body and self._failure is None:
            self._pour_now(self._sink)
            return
        if self._body_bytes > HIGH_WATER_BYTES and not self._watch.held:
            self._watch.held = True
            self._transport.pause_reading()
        self._wake()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        # Where the end of the connection is the end of the reply; one that we cut ourselves is no end.
        by_closing = self._headers_complete and not self._head.delimited and exc is None and self._failure is None
        self._complete = self._complete or by_closing
        self._keep_alive = False
        self._fail(None if self._complete else UpstreamDisconnected("a replica closed the connection too early"))

    # What the parser does

    def on_message_begin(self) -> None:
        if self._complete:
            # A second reply behind the first: it must not add to the one that is being read.
            raise httptools.HttpParserError("more than one reply")

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers_bytes += len(name) + len(value)
        if self._headers_bytes > HEADER_LIMIT_BYTES:
            raise httptools.HttpParserError("headers are too long")
        self._head.headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        self._head.status = self._parser.get_status_code()
        self._headers_complete = self._head.status >= 200

    def on_body(self, body: bytes) -> None:
        self._watch.heard_at = self._loop.time()
        self._body_seen_bytes = self.received_bytes
        self._body.append(body)
        self._body_bytes += len(body)

    def on_message_complete(self) -> None:
        if self._head.status < 200:
            # An interim reply (RFC 9110, 15.2): the real one follows.
            self._head = ResponseHead()
            return
        # A replica that answers before it has read the request may never read the rest, nor what stands behind it.
        # (With TLS this shows only what is not encrypted yet.)
        written = self._transport.get_write_buffer_size() == 0
        self._keep_alive = written and self._parser.should_keep_alive() and self._head.delimited
        self._complete = True

    # Handing on

    def _taken(self) -> bytes:
        data = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        self._body.clear()
        self._body_bytes = 0
        if self._watch.held:
            self._resume()
        return data

    def _pour(self, sink: Callable[[bytes], bool]) -> bool:
        return sink(self._taken())

    def _pour_now(self, sink: Callable[[bytes], bool]) -> None:
        """Pour what has just arrived; whoever waits in `flow` is woken only if that is the end, or the sink's."""
        try:
            going_on = self._pour(sink)
        except Exception as error:  # noqa: BLE001 - it is raised where it belongs: in the task that waits
            self._refusal = error
            going_on = False
        if not going_on:
            self._sink = None
        if not going_on or self._complete:
            self._wake()

    # Waiting

    async def _wait(self) -> None:
        if self._failure is not None:
            raise self._failure
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _fail(self, failure: Exception | None) -> None:
        self._failure = self._failure or failure
        self._watch.stop()
        self._wake()

    def _break_off(self, why: str) -> None:
        """Hear no more of a replica that is out of step: whoever reads may be slow, and memory is ours."""
        self._fail(UpstreamDisconnected(why))
        self.close()

    def _resume(self) -> None:
        self._watch.held = False
        self._watch.heard_at = self._loop.time()
        self._transport.resume_reading()

    def _time_out(self, what: str) -> None:
        if not self._complete:
            self._fail(UpstreamTimeout(what))
            self.close()
