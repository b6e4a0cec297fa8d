"""What goes back to one client: a whole answer at once, or a stream that begins, goes on and ends."""

import asyncio
import http
import time
from collections.abc import Iterable
from email.utils import formatdate
from typing import Protocol


def header_lines(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Write headers as lines."""
    return b"".join([b"%b: %b\r\n" % header for header in headers])


_STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in http.HTTPStatus}


class ClientDisconnected(Exception):
    """The client is gone, or was cut off; nobody is there to be told anything."""


class WriteTransport(Protocol):
    """The connection that a reply goes out on."""

    paused: bool
    lost: bool

    def write(self, data: bytes) -> None:
        """Hand bytes to the socket."""

    async def drain(self) -> None:
        """Wait until the client has read enough; ClientLeft if it doesn't in time."""


class DateHeader:
    """The `date` header, written anew once a second; RFC 9110, 6.6.1, asks for it."""

    __slots__ = ("_line", "_second")

    def __init__(self) -> None:
        self._second = 0
        self._line = b""

    def line(self) -> bytes:
        """The header as it goes out."""
        second = int(time.time())
        if second != self._second:
            self._second = second
            self._line = b"date: %b\r\n" % formatdate(second, usegmt=True).encode()
        return self._line


class ResponseWriter:
    """One answer. `begun`: status and headers are out; `ended`: all of it is."""

    __slots__ = ("_bodyless", "_chunked", "_clock", "_line", "_supports_chunked", "ended", "keep_alive", "started")

    def __init__(
        self, line: WriteTransport, clock: DateHeader, *, keep_alive: bool, supports_chunked: bool, bodyless: bool
    ) -> None:
        self._line = line
        self._clock = clock
        self._supports_chunked = supports_chunked
        self._bodyless = bodyless  # it answers a HEAD
        self._chunked = False
        self.keep_alive = keep_alive
        self.started = False
        self.ended = False

    @property
    def client_disconnected(self) -> bool:
        """Tell whether nobody reads any more."""
        return self._line.lost

    @property
    def write_paused(self) -> bool:
        """Tell whether the client reads slower than we write; then wait for `drained`."""
        return self._line.paused

    async def drain(self) -> None:
        """Wait until the client has read enough; ClientLeft if it doesn't in time."""
        await self._line.drain()

    def send(self, status: int, headers: bytes, body: bytes) -> None:
        """Answer at once; `headers` are lines."""
        said = b"" if self._bodyless else body
        head = self._head(status, headers)
        self.started = self.ended = True
        self._line.write(b"%bcontent-length: %d\r\n\r\n%b" % (head, len(body), said))

    def start(self, status: int, headers: bytes, data: bytes = b"") -> None:
        """Begin a stream, with its first bytes if they are there."""
        self.started = True
        self._chunked = self._supports_chunked
        if not self._chunked:
            # HTTP/1.0 has no chunks: the end of the connection is the end of the answer.
            self.keep_alive = False
        framing = b"transfer-encoding: chunked\r\n" if self._chunked else b""
        said = self._framed(data) if data else b""
        self._line.write(b"%b%b\r\n%b" % (self._head(status, headers), framing, said))

    def write(self, data: bytes) -> None:
        """Go on with a stream."""
        self._line.write(self._framed(data))

    def end(self, data: bytes = b"") -> None:
        """End a stream, with its last bytes."""
        self.ended = True
        last = self._framed(data) if data else b""
        if self._chunked and not self._bodyless:
            last += b"0\r\n\r\n"
        if last:
            self._line.write(last)

    def _head(self, status: int, headers: bytes) -> bytes:
        closing = b"" if self.keep_alive else b"connection: close\r\n"
        line = _STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status  # a number without a name, of a replica's
        return b"%b%b%b%b" % (line, self._clock.line(), headers, closing)

    def _framed(self, data: bytes) -> bytes:
        if self._bodyless:
            return b""
        return b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data


async def wait_within(seconds: float, waiter: "asyncio.Future[None]") -> bool:
    """Wait for a future, and tell whether it came in time."""
    try:
        async with asyncio.timeout(seconds):
            await waiter
    except TimeoutError:
        return False
    return True
