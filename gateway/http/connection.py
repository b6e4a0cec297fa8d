"""One client's connection: a task for each request, answers in order, and a deadline for everything.

Own code stands here where uvicorn would do, because uvicorn alone costs as much CPU per request as a bare protocol that
asks a replica, too (tests/benchmarks/RESULTS.md), and bounds neither a request's head nor the time that it takes.
"""

import asyncio
import logging
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


class ClientConnection(asyncio.Protocol):
    """Reads requests, has each answered by a task, and ends that task when the client leaves."""

    def __init__(self, front: ServerContext) -> None:
        self._front = front
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport  # from `connection_made` on, which comes before anything else
        self._reading = RequestParser(front, self)
        self._arrived: deque[Request] = deque()  # read, and behind the one that is being answered
        self._task: asyncio.Task[None] | None = None
        self._drain: asyncio.Future[None] | None = None
        self._linger_until = 0.0
        self._deadline = self._loop.time() + front.timeouts.keep_alive_seconds
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
        self._front.register(self)
        self._timer = self._loop.call_later(self._front.timeouts.tick_seconds, self._tick)

    def data_received(self, data: bytes) -> None:
        if self._reading.dropping is None:
            self._reading.feed(data)
        else:
            self._linger(len(data))

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
        self._reading.abandon()
        for request in self._arrived:
            self._front.release(request)
        self._arrived.clear()
        self._front.unregister(self)

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        if self._drain is not None and not self._drain.done():
            self._drain.set_result(None)

    # What comes

    def expect_within(self, seconds: float) -> None:
        """More of a request must come in time, unless one is being answered."""
        if self._task is None:
            self._deadline = self._loop.time() + seconds

    def send_100_continue(self) -> None:
        """Tell a client that waits for it that its body is welcome."""
        if self._task is None:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_request(self, request: Request) -> None:
        """Have a request answered when it is its turn; RequestError if there are too many."""
        if len(self._arrived) >= PIPELINED_LIMIT and request.refusal is None:
            self._front.release(request)
            raise RequestError(f"more than {PIPELINED_LIMIT} requests at once on a connection; wait for answers")
        self._arrived.append(request)
        self._next()

    def _linger(self, size_bytes: int) -> None:
        """Drop what still comes; a client that has written all that it announced reads next, and needs no more time."""
        reading = self._reading
        assert reading.dropping is not None
        reading.dropping -= size_bytes
        if reading.dropping < -SHORT_BODY_BYTES:
            self._transport.abort()
        elif self._task is None:
            self._deadline = min(self._loop.time() + self._front.timeouts.linger_seconds, self._linger_until)
            if reading.dropping <= 0:
                self._transport.close()

    # Answering

    def _next(self) -> None:
        if self._task is not None or not self._arrived or self._transport.is_closing():
            return  # A task that is cancelled before it begins would give nothing back.
        request = self._arrived.popleft()
        reply = ResponseWriter(
            self,
            self._front.clock,
            keep_alive=request.keep_alive and not self._front.draining,
            supports_chunked=request.supports_chunked,
            bodyless=request.method == b"HEAD",
        )
        self._task = self._loop.create_task(self._answer(request, reply))

    async def _answer(self, request: Request, reply: ResponseWriter) -> None:
        try:
            await self._front.handler.handle(request, reply)
        except ClientDisconnected:
            self._transport.abort()
        except Exception:
            # The outermost loop of a request: a defect of ours ends this one, and no other.
            log.exception("a request to %s failed", request.path[:200])
            self._front.handler.on_internal_error(request, reply)
        finally:
            self._answered(request, reply)

    def _answered(self, request: Request, reply: ResponseWriter) -> None:
        self._task = None
        self._front.release(request)
        self._front.notify_idle()
        if self.lost:
            return
        if not reply.ended:
            self._transport.abort()
        elif self._arrived and reply.keep_alive:
            self._next()
        elif reply.keep_alive:
            self._deadline = self._loop.time() + self._front.timeouts.keep_alive_seconds
        else:
            self._hang_up()

    def _hang_up(self) -> None:
        """Close behind the answer; a client that is still writing must be able to read it before it sees a reset."""
        if not self._reading.dropping or self._reading.dropping < 0 or not self._transport.can_write_eof():
            self._transport.close()
            return
        now, timeouts = self._loop.time(), self._front.timeouts
        self._deadline, self._linger_until = now + timeouts.linger_seconds, now + timeouts.linger_total_seconds
        self._transport.write_eof()

    # Writing

    def write(self, data: bytes) -> None:
        """Hand bytes to the socket; to a client that left it is nothing."""
        if not self.lost:
            self._transport.write(data)

    async def drain(self) -> None:
        """Wait until the client has read enough; one that doesn't in time is cut off."""
        while self.paused and not self.lost:
            self._drain = self._loop.create_future()
            if not await wait_within(self._front.timeouts.slow_reader_seconds, self._drain):
                self._front.on_client_aborted("slow_reader")
                raise ClientDisconnected
        if self.lost:
            raise ClientDisconnected

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
        self._timer = self._loop.call_later(self._front.timeouts.tick_seconds, self._tick)
        if self._task is not None or self._loop.time() < self._deadline:
            return
        if self._reading.within_request:
            self._reading.refuse(RequestTooSlow("the request didn't arrive in time; send it in one go"))
        else:
            self.close()
