"""A client that notes when every piece of an answer came: closed loops, open loops, streams."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import cast

import httptools

from tests.benchmarks.overhead.loads import CONNECTIONS, Contender, Load


@dataclass(slots=True)
class Answer:
    """One answer; times in seconds of the monotonic clock, `pieces` of the body as they came."""

    asked_at: float
    status: int = 0
    ended_at: float = 0.0
    pieces: list[tuple[float, bytes]] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """From the question to the end of the answer."""
        return self.ended_at - self.asked_at

    @property
    def body(self) -> bytes:
        """All of it."""
        return b"".join([piece for _, piece in self.pieces])

    def good(self, load: Load) -> bool:
        """Tell whether this is the whole answer to a load's request."""
        body = self.body
        if self.status != 200:
            return False
        if not load.chunks:
            return body.endswith(b"}}")
        # Beside the chunks: an opening, a last one, and [DONE].
        return body.count(b"data: ") == load.chunks + 3 and body.endswith(b"data: [DONE]\n\n")


class Line(asyncio.Protocol):
    """One connection; asks one thing at a time."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._parser = httptools.HttpResponseParser(self)
        self._answer = Answer(0.0)
        self._whole: asyncio.Future[Answer] | None = None
        self._came_at = 0.0

    async def ask(self, request: bytes, asked_at: float | None = None) -> Answer:
        """Send a request, and wait for its whole answer."""
        self._answer = Answer(time.monotonic() if asked_at is None else asked_at)
        self._whole = self._loop.create_future()
        self._transport.write(request)
        return await self._whole

    def close(self) -> None:
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._came_at = time.monotonic()
        self._parser.feed_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._whole is not None and not self._whole.done():
            self._whole.set_exception(ConnectionError("the connection ended before the answer did"))

    def on_body(self, body: bytes) -> None:
        self._answer.pieces.append((self._came_at, body))

    def on_message_complete(self) -> None:
        self._answer.status = self._parser.get_status_code()
        self._answer.ended_at = self._came_at
        if self._whole is not None:
            self._whole.set_result(self._answer)


class Lines:
    """Connections to one contender, used in turn."""

    def __init__(self, contender: Contender, lines: Sequence[Line]) -> None:
        self.contender = contender
        self._free: asyncio.Queue[Line] = asyncio.Queue()
        for line in lines:
            self._free.put_nowait(line)

    async def ask(self, request: bytes) -> Answer:
        """Ask on a free connection; waiting for one is part of what the answer took."""
        asked_at = time.monotonic()
        line = await self._free.get()
        try:
            return await line.ask(request, asked_at)
        finally:
            self._free.put_nowait(line)


@asynccontextmanager
async def connected(contender: Contender, count: int = CONNECTIONS) -> AsyncIterator[Lines]:
    """Open connections while the block runs."""
    loop, lines = asyncio.get_running_loop(), list[Line]()
    try:
        for _ in range(count):
            _, line = await loop.create_connection(Line, contender.host, contender.port)
            lines.append(line)
        yield Lines(contender, lines)
    finally:
        for line in lines:
            line.close()


async def asked(contender: Contender, load: Load, count: int, connections: int = CONNECTIONS) -> int:
    """Ask so many times, each connection as fast as it gets answers; returns how many were bad."""
    request, left, bad = contender.request(load), iter(range(count)), 0

    async def one_after_the_other(lines: Lines) -> None:
        nonlocal bad
        for _ in left:
            answer = await lines.ask(request)
            bad += not answer.good(load)

    async with connected(contender, connections) as lines:
        await asyncio.gather(*(one_after_the_other(lines) for _ in range(connections)))
    return bad


async def timed(contender: Contender, load: Load, seconds: float) -> list[Answer]:
    """Ask for so long, each connection as fast as it gets answers."""
    request, ends_at, answers = contender.request(load), time.monotonic() + seconds, list[Answer]()

    async def one_after_the_other(lines: Lines) -> None:
        while time.monotonic() < ends_at:
            answers.append(await lines.ask(request))

    async with connected(contender) as lines:
        await asyncio.gather(*(one_after_the_other(lines) for _ in range(CONNECTIONS)))
    return answers


async def at_a_rate(
    first: Contender, second: Contender, load: Load, per_second: float, seconds: float
) -> list[tuple[Answer, Answer]]:
    """Ask both in turn, whether answers come or not: pairs of answers to questions asked half a step apart.

    An answer's time counts from when its question was sent off: how late this program's own timer is, is no latency.
    """
    pairs = []
    loop = asyncio.get_running_loop()
    async with connected(first) as one, connected(second) as other:
        requests = {lines: lines.contender.request(load) for lines in (one, other)}
        began_at = loop.time()
        for number in range(int(per_second * seconds)):
            asking = {}
            # Each is first every other time, so that neither has the quieter half of a step.
            for place, lines in enumerate((one, other) if number % 2 else (other, one)):
                due = began_at + (number + place / 2) / per_second
                await asyncio.sleep(max(due - loop.time(), 0))
                asking[lines] = loop.create_task(lines.ask(requests[lines]))
            pairs.append((asking[one], asking[other]))
        return [(await mine, await others) for mine, others in pairs]


async def at_once(contender: Contender, load: Load, count: int = CONNECTIONS) -> list[Answer]:
    """Ask on every connection at the same time."""
    request = contender.request(load)
    async with connected(contender, count) as lines:
        return await asyncio.gather(*(lines.ask(request) for _ in range(count)))
