"""Replicas and clients that send exactly the bytes that a test writes down, over real sockets."""

import asyncio
import json
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fakes.running import DEADLINE_SECONDS, HOST

HEAD_END = b"\r\n\r\n"
POLL = b"GET /metrics "


class Peer:
    """One connection, from the side that a test plays."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, deadline_seconds: float = DEADLINE_SECONDS
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._deadline_seconds = deadline_seconds

    async def request(self) -> bytes:
        """Read one whole request, head and body."""
        async with asyncio.timeout(self._deadline_seconds):
            head = await self._reader.readuntil(HEAD_END)
            return head + await self._reader.readexactly(length_in(head))

    async def say(self, data: bytes) -> None:
        """Write bytes, and drain.

        Raises ConnectionResetError if the other side has closed, where uvloop would raise RuntimeError.
        """
        if self._writer.transport.is_closing():
            raise ConnectionResetError
        self._writer.write(data)
        await self._writer.drain()

    async def read_until(self, end: bytes) -> bytes:
        """Read up to some bytes, and those."""
        async with asyncio.timeout(self._deadline_seconds):
            return await self._reader.readuntil(end)

    async def read_some(self) -> bytes:
        """Read what has arrived, at least one byte; b"" at the end."""
        async with asyncio.timeout(self._deadline_seconds):
            return await self._reader.read(65536)

    async def read_all(self) -> bytes:
        """Read until the other side closes."""
        async with asyncio.timeout(self._deadline_seconds):
            return await self._reader.read()

    async def left(self) -> bool:
        """Wait until the other side has closed, orderly or with a reset."""
        try:
            return await self.read_all() == b""
        except ConnectionResetError:
            return True

    def half_close(self) -> None:
        """End the own side of the connection; the other side can still be read."""
        self._writer.write_eof()

    def finish(self) -> None:
        """Close the connection in an orderly way."""
        self._writer.close()

    def reset(self) -> None:
        """Close the connection with a reset."""
        linger_for_nothing = struct.pack("ii", 1, 0)
        self._writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger_for_nothing)
        self._writer.transport.abort()


Behaviour = Callable[[Peer], Awaitable[None]]


@dataclass(slots=True)
class Flood:
    """A replica that answers with `total` bytes as fast as they are read; `sent` counts them."""

    total: int
    sent: int = 0

    async def __call__(self, peer: Peer) -> None:
        """Answer one request."""
        piece = b"x" * 2**16
        await peer.request()
        await peer.say(f"HTTP/1.1 200 OK\r\ncontent-length: {self.total}\r\n\r\n".encode())
        while self.sent < self.total:
            await peer.say(piece)
            self.sent += len(piece)
        await peer.left()


@dataclass(slots=True)
class ScriptedReplica:
    """A server whose every connection follows the same script; keeps its peers."""

    url: str
    peers: list[Peer] = field(default_factory=list)


@asynccontextmanager
async def scripted(
    behaviour: Behaviour, *, secure: ssl.SSLContext | None = None, path: Path | None = None, polled: bool = False
) -> AsyncIterator[ScriptedReplica]:
    """Run a replica that plays a behaviour on each connection, which it closes at the end.

    It listens on a port, with TLS if `secure` is given, or on a Unix socket at `path`. With `polled`, polls of its
    metrics are part of the script; otherwise they get 404.
    """
    failures: list[BaseException] = []
    tasks: set[asyncio.Task[None]] = set()
    writers: list[asyncio.StreamWriter] = []

    async def play(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first = b"" if polled else await answer_polls(reader, writer)
        peer = Peer(reader if polled else prepended(reader, first, tasks), writer)
        replica.peers.append(peer)
        try:
            await behaviour(peer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the gateway may close at any time
        except Exception as error:  # noqa: BLE001 - asserted below
            failures.append(error)
        finally:
            peer.finish()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        tasks.add(asyncio.create_task(play(reader, writer)))

    if path is not None:
        server: asyncio.Server = await asyncio.start_unix_server(accept, path)
        replica = ScriptedReplica(f"unix://{path}")
    else:
        server = await asyncio.start_server(accept, HOST, 0, ssl=secure)
        replica = ScriptedReplica(f"http{'s' if secure else ''}://{HOST}:{server.sockets[0].getsockname()[1]}")
    try:
        yield replica
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for writer in writers:
            writer.close()  # a task that was cancelled before it began did not
    assert not failures, failures


async def answer_polls(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    """Answer polls with 404, and return the first bytes of the first other request."""
    with suppress(ConnectionError):
        try:
            while (first := await reader.readexactly(len(POLL))) == POLL:
                await reader.readuntil(HEAD_END)
                if writer.transport.is_closing():
                    return b""
                writer.write(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n")
        except asyncio.IncompleteReadError as error:
            return error.partial
        else:
            return first
    return b""


def prepended(reader: asyncio.StreamReader, first: bytes, tasks: "set[asyncio.Task[None]]") -> asyncio.StreamReader:
    """Make a reader that begins with bytes that were read already."""
    copy = asyncio.StreamReader(limit=2**24)

    async def pump() -> None:
        data = first
        try:
            while data:
                copy.feed_data(data)
                data = await reader.read(2**16)
        except ConnectionError as error:
            copy.set_exception(error)
        else:
            copy.feed_eof()

    tasks.add(asyncio.create_task(pump()))
    return copy


def answering(*replies: bytes, close: bool = True) -> Behaviour:
    """Make a behaviour that answers one request after the other with these bytes."""

    async def behaviour(peer: Peer) -> None:
        for reply in replies:
            await peer.request()
            await peer.say(reply)
        if not close:
            await peer.left()

    return behaviour


@asynccontextmanager
async def connected(url: str, deadline_seconds: float = DEADLINE_SECONDS) -> AsyncIterator[Peer]:
    """Open a connection as a client, with a deadline for each read."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield Peer(reader, writer, deadline_seconds)
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


def posted(body: dict[str, Any], path: str = "/v1/chat/completions", extra: str = "") -> bytes:
    """Encode a request of a client."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n{extra}"
    return f"{head}content-length: {len(data)}\r\n\r\n".encode() + data


def length_in(head: bytes) -> int:
    """The content-length of a head; 0 without one."""
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return int(line.partition(b":")[2])
    return 0


def whole(body: bytes, status: str = "200 OK", kind: str = "application/json", extra: str = "") -> bytes:
    """Encode a reply with a length."""
    head = f"HTTP/1.1 {status}\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n{extra}\r\n"
    return head.encode() + body


def stream_head(kind: str = "text/event-stream; charset=utf-8") -> bytes:
    """Encode the head of a chunked stream."""
    return f"HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\ntransfer-encoding: chunked\r\n\r\n".encode()


def chunk(data: bytes) -> bytes:
    """Encode one chunk; b"" is the end."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def stream(*pieces: bytes) -> bytes:
    """Encode a whole stream, each piece in its own chunk."""
    return stream_head() + b"".join(map(chunk, pieces)) + chunk(b"")


class Still(asyncio.Transport):
    """A transport that discards everything."""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Discard bytes."""

    def get_write_buffer_size(self) -> int:
        """Return 0: nothing is buffered."""
        return 0

    def pause_reading(self) -> None:
        """Ignore it: the test feeds the bytes."""

    def resume_reading(self) -> None:
        """Ignore it."""

    def abort(self) -> None:
        """Ignore it: no socket is open."""
