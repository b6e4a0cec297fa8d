"""One client connection: reads pipelined requests, answers them in order, and enforces the client timeouts.

It replaces uvicorn on the client port. Uvicorn alone costs as much CPU per request as a bare asyncio protocol that also
queries a replica (tests/benchmarks/RESULTS.md), and limits neither the size of a request's head nor the time it takes.

State: idle (no request), reading (a request is incomplete), answering (a handler task runs; complete requests wait in
`_pipelined`), lingering (the response to a refused request is out, and its rest still arrives), closed.

=====================  ====================================================================================
event                  idle            reading         answering                lingering
=====================  ====================================================================================
bytes                  reading         reading         parsed as well           dropped; closed when all that
                                                                                was announced has arrived,
                                                                                aborted if much more arrives
request complete       answering       answering       queued; refused with     -
                                                       400 if 16 are queued
response ended         -               -               answering the next one   -
                                                       in the queue; else idle
                                                       (keep-alive), lingering
                                                       (client still writes) or
                                                       closed
handler ended without  -               -               aborted                  -
ending the response
client lost            closed          closed          closed; the handler is   closed
                                                       cancelled
client sent FIN        closed          closed          see below                closed
deadline tick          closed          answering the   an incomplete request    closed
                                       refusal (408)   behind it is refused
drain                  closed          closed          finishes, or is          closed
                                                       cancelled after the
                                                       grace time; then closed
hand over              closed after    finishes        finishes, as in drain    closed after the
                       the response                                             grace time
                       to its next
                       request, when
                       idle for too
                       long, or after
                       the grace time
=====================  ====================================================================================

While a refused request is being answered, its remaining bytes are dropped as in lingering. A client that does not read
its response is aborted after `slow_reader_seconds`, in `drain`.

A FIN may mean that the client has left, or that it sends no more requests and reads on (half-closed). Once a response
has begun it has left: SDKs close a stream that they need no more. Before that, it is asked with `100 Continue`, which
every HTTP/1.1 client ignores: the kernel of one that has left answers with a reset, which the next tick finds. One of
HTTP/1.0 knows no interim responses; it has `linger_seconds` for its answer.
"""

import asyncio
import logging
import math
import select
import socket
from collections import deque
from typing import cast

from gateway.errors import RequestError, RequestTooSlow
from gateway.http.interfaces import ServerContext
from gateway.http.limits import PIPELINED_LIMIT, SHORT_BODY_BYTES
from gateway.http.parser import RequestParser
from gateway.http.request import Request
from gateway.http.response_writer import ClientDisconnected, ResponseWriter, wait_within

log = logging.getLogger(__name__)

WRITE_HIGH_WATER_BYTES = 64 * 1024
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class ClientConnection(asyncio.Protocol):
    """Asyncio protocol of one connection; runs one handler task at a time and cancels it when the client is lost."""

    def __init__(self, server: ServerContext) -> None:
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport  # set by `connection_made`, before any other call
        self._parser = RequestParser(server, self)
        self._pipelined: deque[Request] = deque()  # complete requests behind the one being answered
        self._task: asyncio.Task[None] | None = None
        self._response: ResponseWriter | None = None  # of the request being answered
        self._half_closed = self._encrypted = False
        self._drain_waiter: asyncio.Future[None] | None = None
        self._incomplete: Request | None = None  # the latest one that did not arrive in one piece
        self._incomplete_bytes = 0  # of its body
        self._body_until = 0.0
        self._linger_until = 0.0
        self._deadline = self._loop.time() + server.keep_alive_seconds
        self._timer: asyncio.TimerHandle | None = None
        self.write_paused = False
        self.disconnected = False

    @property
    def busy(self) -> bool:
        """Whether a request is being answered."""
        return self._task is not None

    # Events of the transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports have the interface of asyncio's, but are not subclasses.
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=WRITE_HIGH_WATER_BYTES)
        self._encrypted = transport.get_extra_info("ssl_object") is not None
        self._server.register(self)
        self._timer = self._loop.call_later(self._server.timeouts.tick_seconds, self._tick)

    def data_received(self, data: bytes) -> None:
        parser = self._parser
        if parser.dropping is not None:
            self._drop(len(data))
            return
        parser.feed(data)
        if parser.request is not None:
            self._expect_more(parser.request)

    def eof_received(self) -> bool:
        """Whether to keep the connection: its requests are still answered if the client may be reading."""
        response = self._response
        if self._task is None or response is None or response.started or self._encrypted:
            return False  # TLS has no half-closed connections here: asyncio closes it
        self._half_closed = True
        self._parser.abandon()  # a request behind it will never be complete
        if response.supports_chunked:
            self._deadline = math.inf
            self._transport.write(CONTINUE)
        else:
            self._deadline = self._loop.time() + self._server.timeouts.linger_seconds
        return True

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        self.disconnected = True
        if self._timer is not None:
            self._timer.cancel()
        if self._task is not None:
            self._task.cancel()
        if self._drain_waiter is not None and not self._drain_waiter.done():
            self._drain_waiter.set_result(None)
        self._parser.abandon()
        for request in self._pipelined:
            self._server.release(request)
        self._pipelined.clear()
        self._server.unregister(self)

    def pause_writing(self) -> None:
        self.write_paused = True

    def resume_writing(self) -> None:
        self.write_paused = False
        if self._drain_waiter is not None and not self._drain_waiter.done():
            self._drain_waiter.set_result(None)

    # Events of the parser

    def send_100_continue(self) -> None:
        """Send `100 Continue`, unless that would end up inside the response to an earlier request."""
        if self._task is None:
            self._transport.write(CONTINUE)

    def on_request(self, request: Request) -> None:
        """Answer a request, after those before it; raises RequestError if too many are pipelined."""
        if len(self._pipelined) >= PIPELINED_LIMIT and request.refusal is None:
            self._server.release(request)
            raise RequestError(
                f"more than {PIPELINED_LIMIT} pipelined requests; wait for responses before sending more"
            )
        if self._task is None and not self._transport.is_closing():
            self._start(request)
        else:
            self._pipelined.append(request)

    def _drop(self, size_bytes: int) -> None:
        """Count dropped bytes of a refused request.

        When all of its announced body has arrived the client will read the response, so the connection can be closed.
        """
        parser = self._parser
        assert parser.dropping is not None
        parser.dropping -= size_bytes
        if parser.dropping < -SHORT_BODY_BYTES:
            self._transport.abort()
        elif self._task is None:
            self._deadline = min(self._loop.time() + self._server.timeouts.linger_seconds, self._linger_until)
            if parser.dropping <= 0:
                self._transport.close()

    def _expect_more(self, request: Request) -> None:
        """Set the deadline of a request that is not complete; it applies also while another one is being answered.

        A piece of a body earns time at the least rate, up to the time that silence may last; a piece of a head none.
        """
        now, timeouts, body_bytes = self._loop.time(), self._server.timeouts, self._parser.body_bytes
        if request is not self._incomplete:
            self._incomplete, self._incomplete_bytes = request, 0
            self._deadline = now + timeouts.head_seconds
        piece_bytes = body_bytes - self._incomplete_bytes
        if not piece_bytes:
            return
        if self._incomplete_bytes:
            self._deadline = timeouts.body_deadline(self._deadline, piece_bytes, now, self._body_until)
        else:
            self._deadline = now + timeouts.body_silence_seconds
            self._body_until = now + timeouts.body_seconds
        self._incomplete_bytes = body_bytes

    # Answering

    def _start(self, request: Request) -> None:
        """Handle a request. Not on a closing transport: a task cancelled before its first step releases nothing."""
        server = self._server
        self._response = response = ResponseWriter(
            self,
            server.date_header,
            request.keep_alive and not (server.draining and not self._pipelined),
            request.supports_chunked,
            request.method == b"HEAD",
        )
        self._task = self._loop.create_task(self._handle(request, response))

    async def _handle(self, request: Request, response: ResponseWriter) -> None:
        try:
            await self._server.handler.handle(request, response)
        except ClientDisconnected:
            self._transport.abort()
        except Exception:
            # Outermost frame of a request: a bug in a handler fails this request only.
            log.exception("unhandled exception in a request to %s", request.path[:200])
            self._server.handler.on_internal_error(request, response)
        finally:
            self._on_handled(request, response)

    def _on_handled(self, request: Request, response: ResponseWriter) -> None:
        self._task = self._response = None
        self._server.release(request)
        if self._server.draining:
            self._server.notify_idle()
        if self.disconnected:
            return
        if not response.ended:
            self._transport.abort()
        elif self._pipelined and response.keep_alive:
            if not self._transport.is_closing():
                self._start(self._pipelined.popleft())
        elif self._half_closed:
            self._transport.close()
        elif response.keep_alive:
            if self._parser.request is None:
                self._deadline = self._loop.time() + self._server.keep_alive_seconds
        else:
            self._close_or_linger()

    def _close_or_linger(self) -> None:
        """Close after the response; if the client still writes a refused request, send FIN only and go on reading.

        Closing with unread data sends a reset, which can destroy the response before the client has read it
        (RFC 9112, section 9.6).
        """
        if not self._parser.dropping or self._parser.dropping < 0 or not self._transport.can_write_eof():
            self._transport.close()
            return
        now, timeouts = self._loop.time(), self._server.timeouts
        self._deadline, self._linger_until = now + timeouts.linger_seconds, now + timeouts.linger_total_seconds
        self._transport.write_eof()

    # Writing

    def write(self, data: bytes) -> None:
        """Write to the socket or its buffer; ignored after a disconnect."""
        if not self.disconnected:
            self._transport.write(data)

    async def drain(self) -> None:
        """Wait until the write buffer is below its low-water mark; ClientDisconnected if the client is gone or slow."""
        while self.write_paused and not self.disconnected:
            self._drain_waiter = self._loop.create_future()
            if not await wait_within(self._server.timeouts.slow_reader_seconds, self._drain_waiter):
                self._server.on_client_aborted("slow_reader")
                raise ClientDisconnected
        if self.disconnected:
            raise ClientDisconnected

    def cancel(self) -> None:
        """Cancel the request that is being answered; called when the grace time of a drain is over."""
        if self._task is not None:
            self._task.cancel()

    def close(self) -> None:
        """Close the connection; abort it if unsent bytes are buffered, since the client may never read them."""
        if self._transport.get_write_buffer_size():
            self._transport.abort()
        else:
            self._transport.close()

    def expire_earlier(self, seconds: float) -> None:
        """Let it be idle for that much less, if it is idle."""
        if self._task is None and self._parser.request is None:
            self._deadline -= seconds

    def _has_unread(self) -> bool:
        """Whether bytes have arrived that the loop has not read yet: to close now would lose a request."""
        arrived = select.poll()
        arrived.register(self._transport.get_extra_info("socket").fileno(), select.POLLIN)
        return bool(arrived.poll(0))

    def _was_reset(self) -> bool:
        """Whether a reset arrived after a FIN: then nothing is read any more, so no event tells of it."""
        connection = self._transport.get_extra_info("socket")
        return bool(connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))

    # Timeouts

    def _tick(self) -> None:
        """Check the deadline. One repeating timer per connection is cheaper than one timer per wait."""
        self._timer = self._loop.call_later(self._server.timeouts.tick_seconds, self._tick)
        if self._half_closed and self._was_reset():
            self._transport.abort()
        if self._loop.time() < self._deadline:
            return
        if self._parser.reading_request:
            message = "request timeout: head or body did not arrive in time, or too slowly; send it without pauses"
            self._parser.refuse(RequestTooSlow(message))
        elif self._task is None and self._parser.dropping is None and self._has_unread():
            return  # they are read before the next tick
        elif self._task is None or (self._half_closed and self._response is not None and not self._response.started):
            self.close()
