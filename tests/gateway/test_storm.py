"""Ten thousand clients that leave at any moment: afterwards nothing is held, by the gateway or the replica."""

import asyncio
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.fakes.running import DEADLINE_SECONDS, FakeReplica, eventually, running_fake
from tests.gateway.fleet import CONFIG, HELLO, STREAM, Fleet, deployment, running_gateway
from tests.gateway.wire import Peer, connected, posted

pytestmark = pytest.mark.asyncio(loop_scope="session")

CANCELS = 10_000
CLIENTS = 48
# Slow enough that most clients leave during an answer.
SLOW = ("--fake-tokens", "30", "--fake-tokens-per-second", "600", "--max-num-seqs", "32")
# On a busy machine one process accepts ten thousand connections slowly; whoever waits here waits for that.
PATIENCE_SECONDS = 60.0
PATIENT = {"aliases": {"smol": {**CONFIG["aliases"]["smol"], "timeouts": {"connect_seconds": PATIENCE_SECONDS}}}}
ESTABLISHED = "01"

UNARY, STREAMED = posted(HELLO), posted(STREAM)


async def leave_during_the_upload(peer: Peer, rng: random.Random) -> None:
    """Send a part of a request."""
    await peer.say(STREAMED[: rng.randrange(1, len(STREAMED))])


async def leave_before_an_answer(peer: Peer, rng: random.Random) -> None:
    """Request a unary answer, and do not wait for it."""
    await peer.say(UNARY)
    await pause(rng)


async def leave_before_a_stream(peer: Peer, rng: random.Random) -> None:
    """Request a stream, and do not wait for it."""
    await peer.say(STREAMED)
    await pause(rng)


async def leave_during_the_stream(peer: Peer, rng: random.Random) -> None:
    """Read some events, and leave."""
    await peer.say(STREAMED)
    for _ in range(rng.randrange(1, 12)):
        await peer.read_until(b"\n\n")


async def leave_during_the_second_stream(peer: Peer, rng: random.Random) -> None:
    """Read one stream to its end, and leave during the next."""
    await peer.say(STREAMED)
    await peer.read_until(b"0\r\n\r\n")
    await leave_during_the_stream(peer, rng)


async def stay(peer: Peer, rng: random.Random) -> None:
    """Read to the end."""
    await peer.say(STREAMED)
    assert (await peer.read_until(b"0\r\n\r\n")).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


WAYS = (
    leave_during_the_upload,
    leave_before_an_answer,
    leave_before_a_stream,
    leave_during_the_stream,
    leave_during_the_second_stream,
    stay,
)
WEIGHTS = (4, 4, 4, 5, 1, 1)


async def pause(rng: random.Random) -> None:
    """Let other tasks run for a while."""
    for _ in range(rng.randrange(40)):
        await asyncio.sleep(0)


async def storm(url: str, ways: Iterator[Any], rng: random.Random, counts: Counter[str]) -> None:
    """Connect and leave, orderly or with a reset, until there are no more ways."""
    for way in ways:
        async with connected(url, PATIENCE_SECONDS) as peer:
            await way(peer, rng)
            if rng.random() < 0.5:
                peer.reset()
        counts[way.__name__] += 1


def connections_to(port: int) -> int:
    """Count the established connections of this machine to a port, see proc(5)."""
    lines = Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]
    fields = [line.split() for line in lines]
    return sum(each[2].endswith(f":{port:04X}") and each[3] == ESTABLISHED for each in fields)


async def generations_at(replica: FakeReplica) -> float:
    """Count the generations that run or wait in the engine."""
    async with httpx.AsyncClient(base_url=replica.url, trust_env=False, timeout=DEADLINE_SECONDS) as client:
        page = (await client.get("/metrics")).text
    gauges = ("vllm:num_requests_running{", "vllm:num_requests_waiting{")
    return sum(float(line.split()[-1]) for line in page.splitlines() if line.startswith(gauges))


@pytest.mark.timeout(180)
async def test_ten_thousand_cancels() -> None:
    """Afterwards requests, leases, reserved bytes, generations and connections are all zero."""
    rng = random.Random(5)
    ways = iter(rng.choices(WAYS, WEIGHTS, k=CANCELS))
    counts: Counter[str] = Counter()
    # Idle connections close soon: only one that is in use, or leaked, could stay.
    short_keep_alive = {"VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "1"}
    async with running_fake(*SLOW, env=short_keep_alive) as replica, running_gateway(deployment(PATIENT)) as fleet:
        with fleet.replicas(("hi", replica.url)):
            async with asyncio.TaskGroup() as group:
                for _ in range(CLIENTS):
                    group.create_task(storm(fleet.url, ways, rng, counts))
            await fleet.at_rest()
            await all_zero(fleet, replica)
    assert counts.total() == CANCELS
    assert set(counts) == {way.__name__ for way in WAYS}


async def all_zero(fleet: Fleet, replica: FakeReplica) -> None:
    """Wait until the replica has noticed that all clients left, then check all counts."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while await generations_at(replica):
            pass
    assert await fleet.total("quantgate_requests_in_flight") == 0
    assert [status.in_flight for status in fleet.registry.snapshot()] == [0]
    assert fleet.reserved_bytes() == 0
    requests = [line["path"] for line in replica.requests()].count("/v1/chat/completions")
    endings = await eventually(lambda: found if len(found := replica.endings()) >= requests else None)
    assert len(endings) == requests
    assert {line["event"] for line in endings} == {"aborted", "finished"}
    # One is the connection of the polls.
    await eventually(lambda: connections_to(replica.port) <= 1)


@pytest.mark.parametrize("body", [HELLO, STREAM], ids=["unary", "stream"])
@pytest.mark.parametrize("flags", [("--fake-stall-before-first-byte",), ("--fake-stall-after-tokens", "2")])
async def test_a_client_that_leaves_stops_the_generation(body: dict[str, Any], flags: tuple[str, ...]) -> None:
    """The engine notices although it sends nothing: the generation would never end by itself."""
    async with running_fake(*flags) as replica, running_gateway(deployment()) as fleet:
        with fleet.replicas(("hi", replica.url)):
            async with connected(fleet.url) as peer:
                await peer.say(posted(body))
                await replica.requested("/v1/chat/completions")
                if body is STREAM and len(flags) > 1:
                    await peer.read_until(b'"content":"m1"')
            assert [line["event"] for line in await replica.ended()] == ["aborted"]
            await fleet.at_rest()
