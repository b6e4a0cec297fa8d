"""One client's connection: HTTP/1.1 over httptools' parser, a task for each request, answers in order.

Own code stands here where uvicorn would do, because uvicorn alone costs as much CPU per request as everything else the
gateway does (tests/benchmarks/RESULTS.md), and bounds neither a request's head nor the time that it takes. RFC 9112 is
the wire format; the parser is strict, so what can be read in two ways is refused.
"""

import asyncio
import logging
from collections import deque
from typing import cast

import httptools

from gateway.errors import GatewayError, Overloaded, RequestError, RequestTooSlow
from gateway.front.house import House
from gateway.front.limits import (
    HEAD_LIMIT_BYTES,
    HEADER_LIMIT,
    LINGER_BYTES,
    PIPELINED_LIMIT,
    SHORT_BODY_BYTES,
    SINGLE_HEADERS,
    long_body,
    long_head,
)
from gateway.front.reply import ClientLeft, Reply, within
from gateway.front.request import Request

log = logging.getLogger(__name__)

WRITE_HIGH_WATER_BYTES = 64 * 1024


class ClientConnection(asyncio.Protocol):
    """Reads requests, has each answered by a task, and ends that task when the client leaves."""

    def __init__(self, front: House) -> None:
        self._front = front
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport  # from `connection_made` on, which comes before anything else
        self._parser = httptools.HttpRequestParser(self)
        self._request: Request | None = None  # the one that is being read
        self._head_bytes = 0
        self._head_read = False
        self._body: list[bytes] = []
        self._body_bytes = 0
        self._body_limit_bytes = 0
        self._declared_bytes: int | None = None  # of a body; None: its end is told when it comes
        self._short = True
        self._arrived: deque[Request] = deque()  # read, and behind the one that is being answered
        self._task: asyncio.Task[None] | None = None
        self._drain: asyncio.Future[None] | None = None
        self._lingering_bytes: int | None = None  # that still may come, and are dropped
        self._linger_until = 0.0
        self._deadline = self._loop.time() + front.patience.keep_alive_seconds
        self._timer: asyncio.TimerHandle | None = None
        self.paused = False
        self.lost = False

    @property
    def busy(self) -> bool:
        """Tell whether a request is being answered."""
        return self._task is not None

    # What the transport does

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are not subclasses of asyncio's, they only behave like them.
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=WRITE_HIGH_WATER_BYTES)
        self._front.joined(self)
        self._timer = self._loop.call_later(self._front.patience.tick_seconds, self._tick)

    def data_received(self, data: bytes) -> None:
        if self._lingering_bytes is not None:
            self._linger(len(data))
            return
        body_bytes = self._body_bytes
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._malformed(RequestError("this is HTTP/1.1 without upgrades; send plain requests"))
        except httptools.HttpParserError as error:
            # What a callback of ours refused is the reason; otherwise the bytes are.
            cause = error.__context__
            refusal = (
                cause if isinstance(cause, GatewayError) else RequestError(f"this is no HTTP/1.1 request: {error}")
            )
            self._malformed(refusal)
        else:
            if self._request is not None and (not self._head_read or self._body_bytes == body_bytes):
                # A head, or what a chunked body may have beside its data: neither is without an end.
                self._head_bytes += len(data)
                if self._head_bytes > HEAD_LIMIT_BYTES:
                    self._malformed(long_head())

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        self.lost = True
        if self._timer is not None:
            self._timer.cancel()
        if self._task is not None:
            self._task.cancel()
        if self._drain is not None and not self._drain.done():
            self._drain.set_result(None)
        for request in (self._request, *self._arrived):
            if request is not None:
                self._let_go(request)
        self._request = None
        self._arrived.clear()
        self._front.left(self)

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        if self._drain is not None and not self._drain.done():
            self._drain.set_result(None)

    # What the parser does

    def on_message_begin(self) -> None:
        self._request = Request()
        self._head_bytes = 0
        self._head_read = False
        self._body_bytes = 0
        self._body_limit_bytes = 0
        if self._task is None:
            self._deadline = self._loop.time() + self._front.patience.head_seconds

    def on_url(self, url: bytes) -> None:
        request = self._reading()
        request.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        headers = self._reading().headers
        name = name.lower()
        if name in headers:
            if name in SINGLE_HEADERS:
                raise RequestError(f"the header {name.decode('latin-1')!r} came twice; send it once")
            value = headers[name] + b", " + value
        headers[name] = value
        if len(headers) > HEADER_LIMIT:
            raise long_head()

    def on_headers_complete(self) -> None:
        request = self._reading()
        self._head_read = True
        request.method = self._parser.get_method()
        version = self._parser.get_http_version()
        request.chunkable = version == "1.1"
        if version not in {"1.1", "1.0"}:
            raise RequestError("this is HTTP/1.1; send such requests")
        if request.chunkable and b"host" not in request.headers:
            raise RequestError("the header 'host' is missing")
        if b"upgrade" in request.headers:
            raise RequestError("this is HTTP/1.1 without upgrades; send no 'upgrade' header")
        if len(request.target) > HEAD_LIMIT_BYTES:
            raise long_head()
        self._admit(request)

    def on_body(self, data: bytes) -> None:
        request = self._reading()
        if self._task is None:
            self._deadline = self._loop.time() + self._front.patience.body_silence_seconds
        self._body_bytes += len(data)
        self._head_bytes = 0
        if self._lingering_bytes is not None:
            self._lingering_bytes -= len(data)
            return
        if request.refusal is None:
            if self._body_bytes > self._body_limit_bytes:
                self._refuse_body(request, long_body(self._body_limit_bytes))
            elif not self._front.hold(len(data)):
                self._refuse_body(request, Overloaded("too many large requests at once", retry_after_seconds=2))
            else:
                request.held_bytes += len(data)
                self._body.append(data)
        if request.refusal is not None and not self._short:
            self._answer_early(request)

    def on_message_complete(self) -> None:
        request = self._reading()
        if self._lingering_bytes is not None:
            self._let_go(request)
            return  # It has been answered already, or nobody will.
        request.body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        self._body.clear()
        self._request = None
        if len(self._arrived) >= PIPELINED_LIMIT:
            raise RequestError(f"more than {PIPELINED_LIMIT} requests at once on a connection; wait for answers")
        request.keep_alive = self._parser.should_keep_alive()
        self._arrived.append(request)
        self._next()

    # Reading

    def _reading(self) -> Request:
        if self._request is None:
            raise RequestError("this is no HTTP/1.1 request: bytes behind its end")
        return self._request

    def _admit(self, request: Request) -> None:
        declared = int(request.headers.get(b"content-length", b"0"))
        self._declared_bytes = None if b"transfer-encoding" in request.headers else declared
        asks_first = request.chunkable and request.headers.get(b"expect", b"").lower() == b"100-continue"
        self._short = self._declared_bytes is not None and declared <= SHORT_BODY_BYTES and not asks_first
        try:
            self._body_limit_bytes = self._front.site.admit(request)
            if declared > self._body_limit_bytes:
                request.refusal = long_body(self._body_limit_bytes)
        except GatewayError as refusal:
            request.refusal = refusal
        if request.refusal is None:
            if asks_first and self._task is None:
                self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        elif not self._short:
            self._answer_early(request)

    def _refuse_body(self, request: Request, refusal: GatewayError) -> None:
        request.refusal = refusal
        self._body.clear()
        self._let_go(request)

    def _answer_early(self, request: Request) -> None:
        """Answer a refused request before the rest of it is here; what still comes is read and dropped for a while."""
        if self._lingering_bytes is None:
            declared = self._declared_bytes
            left = LINGER_BYTES if declared is None else declared - self._body_bytes
            self._lingering_bytes = min(left, LINGER_BYTES)
            self._arrived.append(request)
            self._next()

    def _malformed(self, refusal: GatewayError) -> None:
        """Answer what isn't a request that anybody could answer, and hang up."""
        if self._lingering_bytes is not None:
            return
        self._lingering_bytes = LINGER_BYTES
        request = self._request or Request()
        self._refuse_body(request, refusal)
        self._arrived.append(request)
        self._next()

    def _linger(self, size_bytes: int) -> None:
        """Drop what still comes; a client that has written all that it announced reads next, and needs no more time."""
        assert self._lingering_bytes is not None
        self._lingering_bytes -= size_bytes
        if self._lingering_bytes < -SHORT_BODY_BYTES:
            self._transport.abort()
        elif self._task is None:
            self._deadline = min(self._loop.time() + self._front.patience.linger_seconds, self._linger_until)
            if self._lingering_bytes <= 0:
                self._transport.close()

    # Answering

    def _next(self) -> None:
        if self._task is not None or not self._arrived or self._transport.is_closing():
            return  # A task that is cancelled before it begins would give nothing back.
        request = self._arrived.popleft()
        reply = Reply(
            self,
            self._front.clock,
            keep_alive=request.keep_alive and not self._front.draining,
            chunkable=request.chunkable,
            bodyless=request.method == b"HEAD",
        )
        self._task = self._loop.create_task(self._answer(request, reply))

    async def _answer(self, request: Request, reply: Reply) -> None:
        try:
            await self._front.site.answer(request, reply)
        except ClientLeft:
            self._transport.abort()
        except Exception:
            # The outermost loop of a request: a defect of ours ends this one, and no other.
            log.exception("a request to %s failed", request.path[:200])
            self._front.site.failed(request, reply)
        finally:
            self._answered(request, reply)

    def _answered(self, request: Request, reply: Reply) -> None:
        self._task = None
        self._let_go(request)
        self._front.freed()
        if self.lost:
            return
        if not reply.ended:
            self._transport.abort()
        elif self._arrived and reply.keep_alive:
            self._next()
        elif reply.keep_alive:
            self._deadline = self._loop.time() + self._front.patience.keep_alive_seconds
        else:
            self._hang_up()

    def _hang_up(self) -> None:
        """Close behind the answer; a client that is still writing must be able to read it before it sees a reset."""
        if self._lingering_bytes is None or self._lingering_bytes <= 0 or not self._transport.can_write_eof():
            self._transport.close()
            return
        now, patience = self._loop.time(), self._front.patience
        self._deadline, self._linger_until = now + patience.linger_seconds, now + patience.linger_total_seconds
        self._transport.write_eof()

    def _let_go(self, request: Request) -> None:
        self._front.let_go(request.held_bytes)
        request.held_bytes = 0

    # Writing

    def write(self, data: bytes) -> None:
        """Hand bytes to the socket; to a client that left it is nothing."""
        if not self.lost:
            self._transport.write(data)

    async def drained(self) -> None:
        """Wait until the client has read enough; one that doesn't in time is cut off."""
        while self.paused and not self.lost:
            self._drain = self._loop.create_future()
            if not await within(self._front.patience.slow_reader_seconds, self._drain):
                self._front.cut("slow_reader")
                raise ClientLeft
        if self.lost:
            raise ClientLeft

    def cancel(self) -> None:
        """End the request that is being answered: this process stops."""
        if self._task is not None:
            self._task.cancel()

    def close(self) -> None:
        """Close, at once if the client doesn't read."""
        if self._transport.get_write_buffer_size():
            self._transport.abort()
        else:
            self._transport.close()

    # Time

    def _tick(self) -> None:
        """One timer per connection that looks at a deadline, instead of one per wait."""
        self._timer = self._loop.call_later(self._front.patience.tick_seconds, self._tick)
        if self._task is not None or self._loop.time() < self._deadline:
            return
        if self._request is not None and self._lingering_bytes is None:
            self._malformed(RequestTooSlow("the request didn't arrive in time; send it in one go"))
        else:
            self.close()
