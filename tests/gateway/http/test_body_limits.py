"""Bodies that take their time or much memory: nobody keeps it from others."""

import asyncio
from contextlib import suppress
from dataclasses import replace

import pytest

from gateway.http.interfaces import ClientTimeouts
from tests.fakes.running import DEADLINE_SECONDS, eventually
from tests.gateway.http.echo_server import HEAD, MEMORY_BYTES, served
from tests.gateway.wire import connected

pytestmark = pytest.mark.asyncio(loop_scope="session")

PATIENT = ClientTimeouts(head_seconds=60, body_silence_seconds=60, keep_alive_seconds=60, linger_seconds=0.1)


@pytest.mark.parametrize(
    "timeouts",
    [
        replace(PATIENT, body_silence_seconds=0.3, body_bytes_per_second=1e6),
        replace(PATIENT, body_seconds=0.3),
    ],
    ids=["rate", "total"],
)
@pytest.mark.parametrize("behind_another", [False, True])
async def test_a_trickling_body_has_an_end(timeouts: ClientTimeouts, behind_another: bool) -> None:
    """It falls behind the least rate, or takes too long in all; also while an earlier request is being answered."""
    async with served(timeouts) as here, connected(here.url) as peer:
        if behind_another:
            await peer.say(b"GET /wait HTTP/1.1\r\nhost: a\r\n\r\n")
        await peer.say(HEAD + b"content-length: 250000\r\n\r\n" + b"x" * 100_000)
        await eventually(lambda: here.front.reserved_bytes or None)
        with suppress(ConnectionError):
            async with asyncio.timeout(DEADLINE_SECONDS):
                while here.front.reserved_bytes:
                    await peer.say(b"x")
                    await asyncio.sleep(0.01)
        assert here.front.reserved_bytes == 0
        here.handler.go.set()
        answer = await peer.read_all()
        assert b"HTTP/1.1 408 " in answer
        assert answer.startswith(b"HTTP/1.1 200 " if behind_another else b"HTTP/1.1 408 ")


async def test_an_owner_leaves_memory_to_others() -> None:
    """It may hold half of it; then only its own requests are refused."""
    half = MEMORY_BYTES // 2
    hog = HEAD + b"owner: hog\r\ncontent-length: %d\r\n\r\n"
    async with served() as here, connected(here.url) as first, connected(here.url) as second:
        await first.say(hog % 250_000 + b"x" * (half - 1000))
        await eventually(lambda: here.front.reserved_bytes == half - 1000 or None)
        await second.say(hog % 2000 + b"x" * 2000)
        assert (await second.read_until(b"\r\n\r\n")).startswith(b"HTTP/1.1 429 ")
        for owner in (b"owner: other\r\n", b""):
            async with connected(here.url) as third:
                await third.say(HEAD + owner + b"content-length: 90000\r\n\r\n" + b"x" * 90_000)
                assert (await third.read_until(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
        await second.say(hog % 500 + b"x" * 500)
        await second.read_until(b"POST /x 500")
        first.finish()
        await eventually(lambda: here.front.reserved_bytes == 0 or None)
