"""Clients that notice every request that a gateway loses: raw connections that are kept alive, and the OpenAI SDK.

A lost request is one without a whole answer: the connection was refused or reset, ended before or inside the response,
or the status is not 200. A connection that the server closes while no request is on it is opened again. A client may
not: it sends a request on a connection that has been idle for less than `IDLE_SECONDS`, as HTTP clients do.
"""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from openai import AsyncOpenAI, OpenAIError

from tests.fakes.running import DEADLINE_SECONDS
from tests.gateway.fleet import CHAT, HELLO, STREAM

Answered = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass(slots=True)
class Outcomes:
    """How requests ended: `ok`, or what went wrong; and the running number of streams."""

    counts: Counter[str] = field(default_factory=Counter)
    streams: int = 0

    @property
    def lost(self) -> dict[str, int]:
        """What went wrong, and how often."""
        return {what: count for what, count in self.counts.items() if not what.startswith("ok")}

    def total(self, kind: str) -> int:
        """Requests of a kind that were answered."""
        return self.counts[f"ok {kind}"]


@dataclass(slots=True)
class RawClient:
    """One connection at a time, kept alive as long as the server allows."""

    host: str
    port: int
    _open: Answered | None = None

    async def chat(self) -> str:
        """Send a request and read its response; returns what went wrong, or `ok raw`."""
        try:
            reader, writer = await self._connection()
        except OSError as error:
            return f"raw: connecting failed: {error!r}"
        body = json.dumps(HELLO).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nhost: {self.host}\r\ncontent-type: application/json\r\n"
        try:
            async with asyncio.timeout(DEADLINE_SECONDS * 2):
                writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
                status, keep_alive = await _response(reader)
        except (OSError, EOFError, TimeoutError) as error:
            self.close()
            return f"raw: {error!r}"
        if not keep_alive:
            self.close()
        return "ok raw" if status == 200 else f"raw: status {status}"

    async def _connection(self) -> Answered:
        """The open connection, or a new one if the server has closed it."""
        if self._open is not None and not self._open[0].at_eof():
            return self._open
        self.close()
        self._open = await asyncio.open_connection(self.host, self.port)
        return self._open

    def close(self) -> None:
        """Close the connection."""
        if self._open is not None:
            self._open[1].close()
            self._open = None


async def _response(reader: asyncio.StreamReader) -> tuple[int, bool]:
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
    await reader.readexactly(length)
    return int(head.split(b" ")[1]), b"connection: close" not in head


@asynccontextmanager
async def upgrade_load(
    address: str, *, raw: int, sdk: int, streams: int, pause_seconds: float, scheme: str = "http"
) -> AsyncIterator[Outcomes]:
    """Send requests from so many clients of each kind while the block runs; each pauses after an answer."""
    host, _, port = address.rpartition(":")
    outcomes, stop = Outcomes(), asyncio.Event()
    raw_clients = [RawClient(host, int(port)) for _ in range(raw)]
    async with AsyncOpenAI(
        base_url=f"{scheme}://{address}/v1", api_key="any", max_retries=0, timeout=DEADLINE_SECONDS * 3
    ) as client:

        async def chat() -> str:
            try:
                await client.chat.completions.create(model="smol", messages=HELLO["messages"])
            except OpenAIError as error:
                return f"sdk: {error!r} {error.__cause__!r}"
            return "ok sdk"

        async def stream() -> str:
            outcomes.streams += 1
            try:
                finished = None
                async for chunk in await client.chat.completions.create(**STREAM):
                    finished = chunk.choices[0].finish_reason if chunk.choices else finished
            except OpenAIError as error:
                return f"stream: {error!r} {error.__cause__!r}"
            finally:
                outcomes.streams -= 1
            return "ok stream" if finished else "stream: truncated"

        async def repeat(send: Callable[[], Awaitable[str]], seconds: float) -> None:
            while not stop.is_set():
                outcomes.counts[await send()] += 1
                with suppress(TimeoutError):
                    async with asyncio.timeout(seconds):
                        await stop.wait()

        async with asyncio.TaskGroup() as group:
            for each in raw_clients:
                group.create_task(repeat(each.chat, pause_seconds))
            for _ in range(sdk):
                group.create_task(repeat(chat, pause_seconds))
            for _ in range(streams):
                group.create_task(repeat(stream, 0.0))
            try:
                yield outcomes
            finally:
                stop.set()
    for each in raw_clients:
        each.close()
