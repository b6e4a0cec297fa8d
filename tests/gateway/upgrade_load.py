"""Clients that notice every request that a gateway loses: raw connections that are kept alive, and the OpenAI SDK.

A lost request is one without a whole answer: the connection was refused or reset, ended before or inside the response,
or the status is not 200. A connection that the server has closed while no request was on it is opened again.
"""

import asyncio
import json
import select
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
    """How requests ended: `ok` with the kind of client, or what went wrong."""

    counts: Counter[str] = field(default_factory=Counter)

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
    model: str
    _open: Answered | None = None

    async def chat(self) -> str:
        """Send a request and read its response; returns what went wrong, or `ok raw`."""
        try:
            reader, writer = await self._connection()
        except OSError as error:
            return f"raw: connecting failed: {error!r}"
        body = json.dumps({**HELLO, "model": self.model}).encode()
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
        """The open connection, or a new one if the server has closed it: HTTP clients look before they send, too."""
        if self._open is not None and not _has_ended(*self._open):
            return self._open
        self.close()
        self._open = await asyncio.open_connection(self.host, self.port)
        return self._open

    def close(self) -> None:
        """Close the connection."""
        if self._open is not None:
            self._open[1].close()
            self._open = None


def _has_ended(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
    """Whether the server has closed a connection, even if the loop does not know yet."""
    arrived = select.poll()
    arrived.register(writer.get_extra_info("socket").fileno(), select.POLLIN)
    return reader.at_eof() or writer.is_closing() or bool(arrived.poll(0))


async def _response(reader: asyncio.StreamReader) -> tuple[int, bool]:
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
    await reader.readexactly(length)
    return int(head.split(b" ")[1]), b"connection: close" not in head


@dataclass(frozen=True, slots=True)
class SdkClient:
    """The OpenAI SDK without its retries, which would hide what is lost."""

    client: AsyncOpenAI
    model: str

    async def chat(self) -> str:
        """Send a request; returns what went wrong, or `ok sdk`."""
        try:
            await self.client.chat.completions.create(model=self.model, messages=[{"role": "user", "content": "hi"}])
        except OpenAIError as error:
            return f"sdk: {error!r} {error.__cause__!r}"
        return "ok sdk"

    async def stream(self) -> str:
        """Read a stream to its end; returns what went wrong, or `ok stream`."""
        finished = None
        try:
            async for chunk in await self.client.chat.completions.create(**STREAM):
                finished = chunk.choices[0].finish_reason if chunk.choices else finished
        except OpenAIError as error:
            return f"stream: {error!r} {error.__cause__!r}"
        return "ok stream" if finished else "stream: truncated"


@asynccontextmanager
async def upgrade_load(
    address: str, *, raw: int, sdk: int, streams: int, pause_seconds: float, model: str = "smol"
) -> AsyncIterator[Outcomes]:
    """Send requests from so many clients of each kind while the block runs; each pauses after an answer.

    `model` is that of the requests that are not streams.
    """
    host, _, port = address.rpartition(":")
    outcomes, stop = Outcomes(), asyncio.Event()
    raw_clients = [RawClient(host, int(port), model) for _ in range(raw)]

    async def repeat(send: Callable[[], Awaitable[str]], seconds: float) -> None:
        while not stop.is_set():
            outcomes.counts[await send()] += 1
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await stop.wait()

    url = f"http://{address}/v1"
    async with AsyncOpenAI(base_url=url, api_key="any", max_retries=0, timeout=3 * DEADLINE_SECONDS) as client:
        clients = SdkClient(client, model)
        async with asyncio.TaskGroup() as group:
            for each in raw_clients:
                group.create_task(repeat(each.chat, pause_seconds))
            for _ in range(sdk):
                group.create_task(repeat(clients.chat, pause_seconds))
            for _ in range(streams):
                group.create_task(repeat(clients.stream, 0.0))
            try:
                yield outcomes
            finally:
                stop.set()
    for each in raw_clients:
        each.close()
