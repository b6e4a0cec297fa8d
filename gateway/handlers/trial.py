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
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from gateway.errors import GatewayError
from gateway.handlers.router import SMALL_BODY_BYTES
from gateway.http.interfaces import ClientTimeouts, RequestHandler
from gateway.http.request import Request
from gateway.http.response_writer import ClientDisconnected, DateHeader, ResponseWriter

log = logging.getLogger(__name__)

TARGET = b"/v1/chat/completions"
KEY_HEADER = "x-quantgate-key"
PASSED_HEADERS = ("x-quantgate-floor", "x-quantgate-precision", "x-session-id", "x-request-id")
# The server in front of this one writes its own.
FRAMING_HEADERS = frozenset({b"date", b"connection", b"content-length", b"transfer-encoding"})
HIGH_WATER_BYTES = 64 * 1024


@dataclass(slots=True, eq=False)
class MemoryTransport:
    """Implements WriteTransport: what is written can be read, in this process."""

    slow_reader_seconds: float
    disconnected: bool = False
    write_paused: bool = False  # the reader is behind
    _chunks: deque[bytes] = field(default_factory=deque)
    _size_bytes: int = 0
    _ended: bool = False
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def write(self, data: bytes) -> None:
        """Keep bytes for the reader; ignored after a disconnect."""
        if self.disconnected:
            return
        self._chunks.append(data)
        self._size_bytes += len(data)
        self.write_paused = self._size_bytes > HIGH_WATER_BYTES
        self._changed.set()

    async def drain(self) -> None:
        """Wait for the reader; ClientDisconnected if it does not read on in time.

        The task that writes is cancelled when the reader leaves.
        """
        try:
            async with asyncio.timeout(self.slow_reader_seconds):
                while self.write_paused:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            self.disconnected = True
        if self.disconnected:
            raise ClientDisconnected

    def end(self, *, complete: bool) -> None:
        """Nothing more will be written; a response that is not complete must not look like one."""
        self.disconnected = self.disconnected or not complete
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


def add_trial(app: FastAPI, router: RequestHandler, timeouts: ClientTimeouts | None = None) -> None:
    """Add the endpoint to the app of the admin port; of the timeouts, `slow_reader_seconds` is used."""
    slow_reader_seconds = (timeouts or ClientTimeouts()).slow_reader_seconds

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
        return TrialResponse(router, _client_request(request, bytes(body)), MemoryTransport(slow_reader_seconds))


class TrialResponse(Response):
    """Handles a request and sends its response; when the reader leaves, the request is cancelled."""

    def __init__(self, router: RequestHandler, request: Request, transport: MemoryTransport) -> None:
        super().__init__()
        self._router = router
        self._request = request
        self._transport = transport

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - Starlette's signature
        """Run until the response is sent, or the reader has left."""
        handling = asyncio.create_task(_handle(self._router, self._request, self._transport), name="trial")
        sending = asyncio.create_task(_send(self._transport, send), name="send a trial")
        leaving = asyncio.create_task(_disconnect(receive), name="disconnect of a trial")
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            self._transport.disconnected = True
            for task in (handling, sending, leaving):
                task.cancel()
            await asyncio.gather(handling, sending, leaving, return_exceptions=True)


def _client_request(request: AdminRequest, body: bytes) -> Request:
    headers = {b"content-type": b"application/json"}
    headers |= {name.encode(): request.headers[name].encode() for name in PASSED_HEADERS if name in request.headers}
    if key := request.headers.get(KEY_HEADER):
        headers[b"authorization"] = b"Bearer " + key.encode("latin-1")
    made = Request(headers)
    made.method, made.target, made.body = b"POST", TARGET, body
    return made


async def _handle(router: RequestHandler, request: Request, transport: MemoryTransport) -> None:
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
        transport.end(complete=response.ended)


async def _send(transport: MemoryTransport, send: Send) -> None:
    """Send what is written; of a response that is not complete no end, so that the server closes its connection."""
    started = False
    async for chunk in transport.chunks():
        body = chunk
        if not started:
            started, (status, headers, body) = True, _read_head(chunk)
            await send({"type": "http.response.start", "status": status, "headers": headers})
        if body:
            await send({"type": "http.response.body", "body": body, "more_body": True})
    if not transport.disconnected:
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _disconnect(receive: Receive) -> None:
    """Wait until the reader leaves."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _read_head(data: bytes) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """Split the first write of a response into status, headers and the beginning of its body."""
    head, _, body = data.partition(b"\r\n\r\n")
    status_line, *lines = head.split(b"\r\n")
    fields = (line.partition(b": ") for line in lines)
    kept = [(name, value) for name, _, value in fields if name.lower() not in FRAMING_HEADERS]
    return int(status_line.split(b" ", 2)[1]), kept, body
