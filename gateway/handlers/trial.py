"""`/admin/trial`: one chat request of the status page, answered like any client's, in this process.

The page cannot send it to the clients' port, which is another origin. A key for it is in `x-quantgate-key`.
"""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from fastapi import FastAPI, HTTPException
from fastapi import Request as AdminRequest
from fastapi.responses import Response, StreamingResponse

from gateway.errors import GatewayError
from gateway.handlers.router import SMALL_BODY_BYTES, Router
from gateway.http.request import Request
from gateway.http.response_writer import ClientDisconnected, DateHeader, ResponseWriter

log = logging.getLogger(__name__)

TARGET = b"/v1/chat/completions"
KEY_HEADER = "x-quantgate-key"
PASSED_HEADERS = ("x-quantgate-floor", "x-quantgate-precision", "x-session-id", "x-request-id")
# The server in front of this one writes its own.
FRAMING_HEADERS = frozenset({"date", "connection", "content-length", "transfer-encoding"})
HIGH_WATER_BYTES = 64 * 1024


@dataclass(slots=True, eq=False)
class MemoryTransport:
    """Implements WriteTransport: what is written can be read, in this process."""

    disconnected: bool = False
    write_paused: bool = False  # the reader is behind
    _chunks: deque[bytes] = field(default_factory=deque)
    _size_bytes: int = 0
    _ended: bool = False
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def write(self, data: bytes) -> None:
        """Keep bytes for the reader."""
        self._chunks.append(data)
        self._size_bytes += len(data)
        self.write_paused = self._size_bytes > HIGH_WATER_BYTES
        self._changed.set()

    async def drain(self) -> None:
        """Wait for the reader; the task that writes is cancelled when it leaves."""
        while self.write_paused:
            self._changed.clear()
            await self._changed.wait()
        if self.disconnected:
            raise ClientDisconnected

    def end(self) -> None:
        """Nothing more will be written."""
        self._ended = True
        self._changed.set()

    async def chunks(self) -> AsyncIterator[bytes]:
        """What is written, until its end."""
        while True:
            while self._chunks:
                chunk = self._chunks.popleft()
                self._size_bytes -= len(chunk)
                self.write_paused = self._size_bytes > HIGH_WATER_BYTES
                self._changed.set()
                yield chunk
            if self._ended:
                return
            self._changed.clear()
            await self._changed.wait()


def add_trial(app: FastAPI, router: Router) -> None:
    """Add the endpoint to the app of the admin port."""

    # Not in the schema: its responses are those of the clients' port.
    @app.post("/admin/trial", include_in_schema=False)
    async def trial(request: AdminRequest) -> Response:
        """A body of `/v1/chat/completions`; status, headers and body are those that a client gets."""
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise HTTPException(415, "send application/json")
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > SMALL_BODY_BYTES:
                raise HTTPException(413, f"the body exceeds {SMALL_BODY_BYTES} bytes; use the clients' port")
        transport = MemoryTransport()
        task = asyncio.create_task(_handle(router, _client_request(request, bytes(body)), transport), name="trial")
        chunks = transport.chunks()
        status, headers, first = _read_head(await anext(chunks))
        return StreamingResponse(_body(first, chunks, task, transport), status, headers)


def _client_request(request: AdminRequest, body: bytes) -> Request:
    headers = {b"content-type": b"application/json"}
    headers |= {name.encode(): request.headers[name].encode() for name in PASSED_HEADERS if name in request.headers}
    if key := request.headers.get(KEY_HEADER):
        headers[b"authorization"] = b"Bearer " + key.encode("latin-1")
    made = Request(headers)
    made.method, made.target, made.body = b"POST", TARGET, body
    return made


async def _handle(router: Router, request: Request, transport: MemoryTransport) -> None:
    """Answer a request as a connection of the HTTP server does; without chunked framing."""
    response = ResponseWriter(transport, DateHeader(), keep_alive=False, supports_chunked=False, omit_body=False)
    try:
        router.admit(request)
    except GatewayError as refusal:
        request.refusal = refusal
    try:
        await router.handle(request, response)
    except ClientDisconnected:
        pass
    except Exception:  # the outermost frame of a request
        log.exception("unhandled exception in a request of the status page")
        router.on_internal_error(request, response)
    finally:
        if request.slot is not None:
            request.slot.release()
        transport.end()


def _read_head(data: bytes) -> tuple[int, dict[str, str], bytes]:
    """Split the first write of a response into status, headers and the beginning of its body."""
    head, _, body = data.partition(b"\r\n\r\n")
    status_line, *lines = head.decode("latin-1").split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    kept = {name: value for name, value in headers.items() if name not in FRAMING_HEADERS}
    return int(status_line.split(" ", 2)[1]), kept, body


async def _body(
    first: bytes, chunks: AsyncIterator[bytes], task: "asyncio.Task[None]", transport: MemoryTransport
) -> AsyncIterator[bytes]:
    """The body; when the reader leaves, the request is cancelled as that of a client that leaves."""
    try:
        if first:
            yield first
        async for chunk in chunks:
            yield chunk
    finally:
        transport.disconnected = True
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
