"""Writes one response to a client: complete with `send`, or streamed with `start`, `write` and `end`."""

import asyncio
import http
import time
from collections.abc import Iterable
from email.utils import formatdate
from typing import Protocol


def header_lines(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Encode headers as lines, each with its CRLF."""
    return b"".join([b"%b: %b\r\n" % header for header in headers])


_STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in http.HTTPStatus}


class ClientDisconnected(Exception):
    """The client closed the connection, or the server aborted it: nothing more can be sent."""


class WriteTransport(Protocol):
    """The connection that a response is written to."""

    write_paused: bool
    disconnected: bool

    def write(self, data: bytes) -> None:
        """Write to the socket or its buffer; ignored after a disconnect."""

    async def drain(self) -> None:
        """Wait until the write buffer is below its low-water mark.

        Raises ClientDisconnected if the client disconnects, or does not read within `slow_reader_seconds`.
        """


class DateHeader:
    """Cached `date` header line, formatted once a second (RFC 9110, section 6.6.1)."""

    __slots__ = ("_line", "_second")

    def __init__(self) -> None:
        self._second = 0
        self._line = b""

    def line(self) -> bytes:
        """Return the header line for the current second."""
        second = int(time.time())
        if second != self._second:
            self._second = second
            self._line = b"date: %b\r\n" % formatdate(second, usegmt=True).encode()
        return self._line


class ResponseWriter:
    """Writes one response.

    ==========  ========================================  ====================
    state       attributes                                allowed calls
    ==========  ========================================  ====================
    new         neither                                   `send`, `start`
    streaming   `started`: status and headers are out     `write`, `end`
    complete    `started` and `ended`                     none
    ==========  ========================================  ====================

    `keep_alive` tells the connection whether another request may follow. `extra_headers` are lines for the head of any
    response, to be set before it begins.
    """

    __slots__ = (
        "_chunked",
        "_date_header",
        "_omit_body",
        "_transport",
        "ended",
        "extra_headers",
        "keep_alive",
        "started",
        "supports_chunked",
    )

    def __init__(
        self,
        transport: WriteTransport,
        date_header: DateHeader,
        keep_alive: bool,
        supports_chunked: bool,
        omit_body: bool,
    ) -> None:
        self._transport = transport
        self._date_header = date_header
        self.supports_chunked = supports_chunked
        self._omit_body = omit_body  # response to HEAD
        self._chunked = False
        self.keep_alive = keep_alive
        self.extra_headers = b""
        self.started = False
        self.ended = False

    @property
    def client_disconnected(self) -> bool:
        """Whether the client is gone."""
        return self._transport.disconnected

    @property
    def write_paused(self) -> bool:
        """Whether the write buffer is above its high-water mark; then await `drain` before the next write."""
        return self._transport.write_paused

    async def drain(self) -> None:
        """Wait until the write buffer is below its low-water mark; raises ClientDisconnected."""
        await self._transport.drain()

    def send(self, status: int, headers: bytes, body: bytes) -> None:
        """Send a complete response; `headers` are lines as `header_lines` makes them."""
        payload = b"" if self._omit_body else body
        head = self._head(status, headers)
        self.started = self.ended = True
        self._transport.write(b"%bcontent-length: %d\r\n\r\n%b" % (head, len(body), payload))

    def start(self, status: int, headers: bytes, data: bytes = b"") -> None:
        """Start a streamed response, in one write with its first bytes if they are known."""
        self.started = True
        self._chunked = self.supports_chunked
        if not self._chunked:
            # HTTP/1.0 has no chunked encoding: closing the connection ends the body.
            self.keep_alive = False
        framing = b"transfer-encoding: chunked\r\n" if self._chunked else b""
        payload = self._frame(data) if data else b""
        self._transport.write(b"%b%b\r\n%b" % (self._head(status, headers), framing, payload))

    def write(self, data: bytes) -> None:
        """Write more of a streamed body; `data` must not be empty."""
        self._transport.write(self._frame(data))

    def end(self, data: bytes = b"") -> None:
        """End a streamed response, with its last bytes if any."""
        self.ended = True
        last = self._frame(data) if data else b""
        if self._chunked and not self._omit_body:
            last += b"0\r\n\r\n"
        if last:
            self._transport.write(last)

    def _head(self, status: int, headers: bytes) -> bytes:
        connection = b"" if self.keep_alive else b"connection: close\r\n"
        # A replica may use a status code that is not registered.
        status_line = _STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status
        return b"%b%b%b%b%b" % (status_line, self._date_header.line(), headers, self.extra_headers, connection)

    def _frame(self, data: bytes) -> bytes:
        if self._omit_body:
            return b""
        return b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data


async def wait_within(seconds: float, waiter: "asyncio.Future[None]") -> bool:
    """Wait for a future; False if it is not done within the time."""
    try:
        async with asyncio.timeout(seconds):
            await waiter
    except TimeoutError:
        return False
    return True
