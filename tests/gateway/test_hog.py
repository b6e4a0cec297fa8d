"""One key that uploads for ever, and slowly, does not lock others out."""

from hashlib import sha256

import pytest

from gateway.keys import StoredKey, keys_in_force
from tests.fakes.running import FakeReplica, eventually
from tests.gateway.fleet import HELLO, Fleet, deployment, error_of, running_gateway
from tests.gateway.wire import connected

pytestmark = pytest.mark.asyncio(loop_scope="session")

MEMORY = 8 * 2**20
SETTINGS = {"listen": "127.0.0.1:0", "admin": "127.0.0.1:0", "memory_bytes": MEMORY, "limits": {"body_bytes": MEMORY}}
KEYS = keys_in_force(
    {
        name: StoredKey(sha256=(sha256(name.encode()).hexdigest(),), concurrency=concurrency)
        for name, concurrency in (("hog", None), ("other", None), ("two", 2))
    }
)


def upload(name: str, size_bytes: int) -> bytes:
    """Most of an upload with a key."""
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    head += f"authorization: Bearer {name}\r\ncontent-length: {size_bytes + 1000}\r\n\r\n"
    return head.encode() + b" " * size_bytes


async def ask(fleet: Fleet, name: str) -> int:
    """Send a small request with a key; returns the status."""
    return (await fleet.ask(HELLO, {"authorization": f"Bearer {name}"})).status_code


async def test_uploads_that_do_not_end(fake: FakeReplica) -> None:
    """Two of one key get half of the memory at most, and everybody else is answered."""
    async with running_gateway(deployment({"gateway": SETTINGS}, KEYS)) as fleet:
        with fleet.replicas(("hi", fake.url)):
            async with connected(fleet.url) as first, connected(fleet.url) as second:
                await first.say(upload("hog", 4 * 2**20))
                await eventually(lambda: fleet.reserved_bytes() >= 4 * 2**20 or None)
                await second.say(upload("hog", 4 * 2**20 - 60))
                assert (await second.read_until(b"\r\n\r\n")).startswith(b"HTTP/1.1 429 ")
                assert [await ask(fleet, name) for name in ("other", "hog")] == [200, 429]
            await eventually(lambda: fleet.reserved_bytes() == 0 or None)
            assert await ask(fleet, "hog") == 200


async def test_a_body_on_its_way_counts_for_concurrency(fake: FakeReplica) -> None:
    """A request runs from its head on; one too many is refused before its body, until one ends or is given up."""
    async with running_gateway(deployment({"gateway": SETTINGS}, KEYS)) as fleet:
        with fleet.replicas(("hi", fake.url)):
            async with connected(fleet.url) as first:
                async with connected(fleet.url) as second:
                    for peer in (first, second):
                        await peer.say(upload("two", 1000))
                    await eventually(lambda: fleet.reserved_bytes() == 2000 or None)
                    answer = await fleet.ask(HELLO, {"authorization": "Bearer two"})
                    assert (answer.status_code, error_of(answer)["code"]) == (429, "rate_limit_exceeded")
                    assert answer.headers["retry-after"] == "1"
                    assert await ask(fleet, "other") == 200
                await eventually(lambda: fleet.reserved_bytes() == 1000 or None)
                assert await ask(fleet, "two") == 200
                assert await fleet.total("quantgate_rejections_total", reason="rate_limit") == 1
            await eventually(lambda: fleet.reserved_bytes() == 0 or None)
            assert [await ask(fleet, "two") for _ in range(4)] == [200] * 4
