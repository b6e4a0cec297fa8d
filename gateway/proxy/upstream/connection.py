"""One HTTP/1.1 connection to a replica: an asyncio protocol over httptools' parser. RFC 9112 is the wire format.

As in gateway.http, own code stands where a library would do: on one machine a gateway of nothing else took 2,400 us of
CPU per request with httpx, 200-300 us with aiohttp, and 54-67 us like this.

=========  ============================================  ========================================================
state      event                                         next
=========  ============================================  ========================================================
idle       `send`                                        sent
idle       bytes arrive, or the replica closes           failed: the connection is out of step
sent       status and headers arrive (1xx are skipped)   reading
sent       the replica closes                            failed: UpstreamDisconnected
reading    a piece of the body arrives                   reading; given to `feed` if one is flowing, else kept
reading    more than HIGH_WATER_BYTES are kept           paused: nothing is read until they are taken
reading    the body is complete                          idle if both sides keep the connection alive, else done
reading    the replica closes                            done if the body has no declared length, else failed
any        a timeout passes, or the bytes are invalid    failed, and closed
=========  ============================================  ========================================================
"""

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Self, cast

import httptools

from gateway.errors import UpstreamDisconnected, UpstreamTimeout
from gateway.proxy.upstream.timer import ReplyTimer
from gateway.routing.target import Timeouts

HIGH_WATER_BYTES = 256 * 1024
MAX_HEAD_BYTES = 64 * 1024
NO_BODY_STATUSES = frozenset({204, 304})

Feed = Callable[[bytes], bool]


class Connection(asyncio.Protocol):
    """One request at a time: `send`, `head`, then `read` or `flow`; `reusable` says whether another may follow.

    `status` and `headers` (names in lower case) are valid after `head`. Every wait ends: with data, with
    UpstreamDisconnected, or with UpstreamTimeout. When its `with` block ends, the connection goes to `release` if it is
    reusable; otherwise it is closed.
    """

    def __init__(
        self,
        release: "Callable[[Connection], None] | None" = None,
        on_lost: "Callable[[Connection], None] | None" = None,
    ) -> None:
        self._release = release
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._timer = ReplyTimer(self._loop, self._on_timeout)
        self._transport: asyncio.Transport  # from `connection_made` on, which comes before anything else
        self._parser = httptools.HttpResponseParser(self)
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self._headers_bytes = 0
        self._headers_complete = False
        self._complete = True
        self._keep_alive = True
        self._failure: Exception | None = None
        self._body: list[bytes] = []
        self._body_bytes = 0
        self._feed: Feed | None = None  # of the task that waits in `flow`
        self._feed_error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self.received_bytes = 0
        self._body_seen_bytes = 0  # of those received, up to the last one of a body

    # Called by the owner

    def send(self, request: bytes, timeouts: Timeouts) -> None:
        """Write a whole request; what is known of the last reply is dropped."""
        self.headers = {}
        self.status = self.received_bytes = self._body_seen_bytes = self._headers_bytes = 0
        self._headers_complete = self._complete = self._keep_alive = False
        self._timer.start(timeouts)
        self._transport.write(request)

    async def head(self) -> None:
        """Wait for status and headers; the connection is closed if they do not come."""
        try:
            while not self._headers_complete:
                await self._wait()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.reusable and self._release is not None:
            self._release(self)
        else:
            self.close()

    async def flow(self, feed: Feed) -> bool:
        """Give each piece of the body to `feed` in the step in which it arrives; returns True at the end of the body.

        Returns False if `feed` did, because it is full; then nothing is given until this is called again. An error of
        `feed` is raised here. Waking a task for every piece costs more CPU (RESULTS.md, Bare protocols).
        """
        while True:
            if self._body and not feed(self._take()):
                return False
            if self._complete:
                return True
            self._feed = feed
            try:
                await self._wait()
            finally:
                full, self._feed = self._feed is None, None
            if self._feed_error is not None:
                error, self._feed_error = self._feed_error, None
                raise error
            if full:
                return False

    async def read(self, limit_bytes: int) -> bytes:
        """Read the whole body; UpstreamDisconnected if it is longer than the limit."""
        if self._complete and self._body_bytes <= limit_bytes:
            return self._take()
        parts: list[bytes] = []
        size = 0
        while True:
            while not self._body and not self._complete:
                await self._wait()
            if not self._body:
                return b"".join(parts)
            parts.append(self._take())
            size += len(parts[-1])
            if size > limit_bytes:
                raise UpstreamDisconnected(f"a replica's reply is longer than {limit_bytes} bytes")

    @property
    def streams(self) -> bool:
        """Whether the body is a stream of server-sent events."""
        kind = self.headers.get(b"content-type", b"")
        return kind != b"application/json" and kind.lower().startswith(b"text/event-stream")

    @property
    def reusable(self) -> bool:
        """Whether the reply is complete and read, and the replica keeps the connection open."""
        return self._complete and self._keep_alive and not self._body and self._failure is None

    @property
    def heard_at(self) -> float:
        """When a piece of a body arrived last (monotonic); -inf if none has."""
        return self._timer.heard_at

    def abandon(self, silent_seconds: float, failure: Exception) -> None:
        """Fail the exchange, if there is one and it has received nothing for so long."""
        if not self._complete and self._failure is None and self._timer.silent_seconds >= silent_seconds:
            self._fail(failure)
            self.close()

    def close(self) -> None:
        """Close at once; a replica takes this for a client that left, and stops generating."""
        self._timer.stop()
        self._transport.abort()

    # Called by the transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are not subclasses of asyncio's, they only behave like them.
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self.received_bytes += len(data)
        if self._complete:
            # No request is in flight: the connection is out of step.
            self._break_off("a replica sent unexpected bytes")
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._break_off(f"a replica's reply is not valid HTTP: {error}")
        if self.received_bytes - self._body_seen_bytes > MAX_HEAD_BYTES:
            # A header or trailer without an end never reaches `on_header`.
            self._break_off("the headers of a replica's reply do not end")
        feed = self._feed
        if feed is not None and self._body and self._failure is None:
            self._feed_now(feed)
        elif self._headers_complete or self._failure is not None:
            if self._body_bytes > HIGH_WATER_BYTES and not self._timer.paused:
                self._timer.paused = True
                self._transport.pause_reading()
            self._wake()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        # The end of the connection may be the end of the reply; not of one that was closed here.
        at_end = self._headers_complete and not self._delimited() and exc is None and self._failure is None
        self._complete = self._complete or at_end
        self._keep_alive = False
        self._fail(None if self._complete else UpstreamDisconnected("a replica closed the connection too early"))
        if self._on_lost is not None:
            self._on_lost(self)

    # Called by the parser

    def on_message_begin(self) -> None:
        if self._complete:
            # A second reply behind the first must not add to the one that is being read.
            raise httptools.HttpParserError("more than one reply")

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.received_bytes > MAX_HEAD_BYTES:
            # Shorter heads are within the limit: don't count.
            self._headers_bytes += len(name) + len(value)
            if self._headers_bytes > MAX_HEAD_BYTES:
                raise httptools.HttpParserError("headers are too long")
        self.headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        self.status = status = self._parser.get_status_code()
        self._headers_complete = status >= 200

    def on_body(self, body: bytes) -> None:
        self._timer.received_at = self._loop.time()
        self._body_seen_bytes = self.received_bytes
        self._body.append(body)
        self._body_bytes += len(body)

    def on_message_complete(self) -> None:
        if self.status < 200:
            # An interim reply (RFC 9110, 15.2): the final one follows.
            self.status, self.headers = 0, {}
            return
        # A replica that replies before it has read the request may never read the rest, nor what is sent behind it.
        # (With TLS this shows only what is not encrypted yet.)
        written = not self._transport.get_write_buffer_size()
        self._keep_alive = written and self._parser.should_keep_alive() and self._delimited()
        self._complete = True

    def _delimited(self) -> bool:
        """Whether the reply says where it ends; otherwise the end of the connection is its end."""
        headers = self.headers
        return (
            b"content-length" in headers
            or b"chunked" in headers.get(b"transfer-encoding", b"").lower()
            or self.status in NO_BODY_STATUSES
        )

    # Giving the body away

    def _take(self) -> bytes:
        body, self._body = self._body, []
        self._body_bytes = 0
        data = body[0] if len(body) == 1 else b"".join(body)
        if self._timer.paused:
            self._timer.paused = False
            self._timer.received_at = self._loop.time()
            self._transport.resume_reading()
        return data

    def _feed_now(self, feed: Feed) -> None:
        """Give away what has just arrived; the task in `flow` wakes up only at the end, or if `feed` is full."""
        try:
            accepted = feed(self._take())
        except Exception as error:  # noqa: BLE001 - raised in the task that waits in `flow`
            self._feed_error = error
            accepted = False
        if not accepted:
            self._feed = None
            self._wake()
        elif self._complete:
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
        self._timer.stop()
        self._wake()

    def _break_off(self, why: str) -> None:
        """Stop reading from a replica that is out of step: its bytes would fill memory while the reader is slow."""
        self._fail(UpstreamDisconnected(why))
        self.close()

    def _on_timeout(self, what: str) -> None:
        if not self._complete:
            self._fail(UpstreamTimeout(what))
            self.close()
