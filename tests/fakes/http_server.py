"""A small HTTP/1.1 server: keep-alive, pipelining, chunked streams; a client that disconnects cancels its answer."""

import asyncio
import contextlib
import http
import json
import socket
import ssl
import traceback
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import httptools

CLOSING_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Request:
    """One whole request; header names are in lower case."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes
    query: str = ""


class Reply:
    """The answer to one request: `send` once, or `start_stream`, `write`s and `end_stream`, or `drop`."""

    def __init__(self, connection: "Connection", *, keep_alive: bool) -> None:
        self._connection = connection
        self.keep_alive = keep_alive

    async def send(
        self,
        status: int,
        body: bytes,
        content_type: str = "application/json",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Answer at once, with a length."""
        described = (
            {"content-length": str(len(body)), "content-type": content_type} if body else {"content-length": "0"}
        )
        await self._connection.write(self._head(status, {**described, **(headers or {})}) + body)

    async def send_json(self, status: int, body: Any, headers: Mapping[str, str] | None = None) -> None:
        """Answer at once, with a JSON document as compact as vLLM's."""
        await self.send(status, json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode(), headers=headers)

    async def start_stream(self, content_type: str, headers: Mapping[str, str]) -> None:
        """Send the head of a chunked answer."""
        described = {"content-type": content_type, "transfer-encoding": "chunked"}
        await self._connection.write(self._head(200, {**described, **headers}))

    async def write(self, data: bytes) -> None:
        """Send a part of the body, in pieces of `piece_bytes` if the server has a limit."""
        size = self._connection.server.piece_bytes or len(data)
        for start in range(0, len(data), size):
            piece = data[start : start + size]
            # Each piece is a chunk of its own: readers then see the split even where TCP joins segments again.
            await self._connection.write(b"%x\r\n%b\r\n" % (len(piece), piece))

    async def end_stream(self) -> None:
        """Send the last chunk."""
        await self._connection.write(b"0\r\n\r\n")

    def drop(self) -> None:
        """Close the connection behind what was sent, complete or not, as a killed process does."""
        self.keep_alive = False
        self._connection.close()

    def _head(self, status: int, headers: Mapping[str, str]) -> bytes:
        lines = [f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}", "server: uvicorn"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        if not self.keep_alive:
            lines.append("connection: close")
        return "\r\n".join([*lines, "", ""]).encode("latin-1")


Handle = Callable[[Request, Reply], Awaitable[None]]


class Server:
    """Owns the listening socket and every connection."""

    def __init__(self, handle: Handle, *, keep_alive_seconds: float, piece_bytes: int | None) -> None:
        self.handle = handle
        self.keep_alive_seconds = keep_alive_seconds
        self.piece_bytes = piece_bytes
        self.connections: set[Connection] = set()
        self._changed = asyncio.Event()
        self._listener: asyncio.Server | None = None

    async def listen(self, bound: socket.socket, tls: ssl.SSLContext | None = None) -> None:
        """Accept connections from now on; before, they are refused."""
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_server(lambda: Connection(self), sock=bound, backlog=2048, ssl=tls)

    async def quiet(self) -> None:
        """Return when no request is being answered."""
        await self._until(lambda: not any(connection.busy for connection in self.connections))

    async def stop(self) -> None:
        """Stop listening, cancel the answers in progress, and close all connections."""
        if self._listener is not None:
            self._listener.close()
        for connection in list(self.connections):
            connection.cut()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSING_SECONDS):
                await self._until(lambda: not self.connections)

    def changed(self) -> None:
        """A connection came, went, or finished an answer."""
        self._changed.set()

    async def _until(self, true: Callable[[], bool]) -> None:
        while not true():
            self._changed.clear()
            await self._changed.wait()


class Connection(asyncio.Protocol):
    """One client: parses its requests and answers them one after the other."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._parser = httptools.HttpRequestParser(self)
        self._waiting: deque[tuple[Request, Reply]] = deque()
        self._answering: asyncio.Task[None] | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._idle: asyncio.TimerHandle | None = None

    @property
    def busy(self) -> bool:
        """Whether a request is being answered."""
        return self._answering is not None

    async def write(self, data: bytes) -> None:
        """Write bytes to the socket, after waiting for a client that reads too slowly."""
        await self._writable.wait()
        self._transport.write(data)

    def close(self) -> None:
        """Close once everything written has been sent."""
        self._transport.close()

    def cut(self) -> None:
        """Cancel the answer in progress, if any, and close."""
        if self._answering is not None:
            self._answering.cancel()
        self.close()

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self.server.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_idling()
        self.server.connections.discard(self)
        if self._answering is not None:
            self._answering.cancel()
        self.server.changed()

    def data_received(self, data: bytes) -> None:
        self._stop_idling()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._transport.write(b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
            self.close()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    # What the parser calls.

    def on_message_begin(self) -> None:
        self._url, self._headers, self._body = b"", dict[str, str](), bytearray()

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        if self._headers.get("expect", "").lower() == "100-continue" and not self.busy:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        url = httptools.parse_url(self._url)
        path, query = url.path.decode("latin-1"), (url.query or b"").decode("latin-1")
        request = Request(self._parser.get_method().decode(), path, self._headers, bytes(self._body), query)
        self._waiting.append((request, Reply(self, keep_alive=self._parser.should_keep_alive())))
        self._answer_next()

    # Requests, one at a time.

    def _answer_next(self) -> None:
        if self._answering is None and self._waiting and not self._transport.is_closing():
            request, reply = self._waiting.popleft()
            self._answering = asyncio.create_task(self._answer(request, reply))

    async def _answer(self, request: Request, reply: Reply) -> None:
        try:
            await self.server.handle(request, reply)
        except Exception:  # noqa: BLE001 - the outermost loop: a broken fake must be seen, and must not hang its client
            traceback.print_exc()
            reply.drop()
        finally:
            self._answering = None
            self.server.changed()
        self._after(reply)

    def _after(self, reply: Reply) -> None:
        if not reply.keep_alive:
            self.close()
        elif self._waiting:
            self._answer_next()
        else:
            loop = asyncio.get_running_loop()
            self._idle = loop.call_later(self.server.keep_alive_seconds, self.close)

    def _stop_idling(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
