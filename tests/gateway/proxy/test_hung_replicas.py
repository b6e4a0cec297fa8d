"""A replica whose process stands still, over sockets: what becomes of its requests, and of new ones."""

import asyncio
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from serving.replica import State
from tests.fakes.running import PATIENCE_SECONDS, FakeReplica, eventually, running_fake
from tests.gateway.fleet import CHAT, HELLO, STREAM, deployment, events_in, running_gateway, text_of

pytestmark = pytest.mark.asyncio(loop_scope="session")


@contextmanager
def stopped(fake: FakeReplica) -> Iterator[None]:
    """Stop the process of a fake while the block runs."""
    os.kill(fake.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(fake.pid, signal.SIGCONT)


@pytest.mark.parametrize("found_by", ["polls", "health check"])
async def test_a_hung_replica(found_by: str) -> None:
    """What has sent nothing moves to another replica, what has begun ends with an error, new requests go elsewhere."""
    stalling = ("--fake-stall-after-tokens", "2")
    retries = {"share": 0, "burst": 0}
    settings = {"listen": "127.0.0.1:0", "admin": "127.0.0.1:0", "retries": retries}
    async with (
        running_gateway(deployment({"gateway": settings})) as fleet,
        running_fake(*stalling) as hung,
        running_fake() as other,
    ):
        fleet.client.timeout = PATIENCE_SECONDS
        with fleet.replicas(("hi", hung.url)):
            await eventually(lambda: hung.requests("/metrics"))
            async with fleet.client.stream("POST", CHAT, json=STREAM) as answer:
                begun = answer.aiter_raw()
                first = await anext(begun)
                unary = asyncio.create_task(fleet.ask(HELLO))
                await hung.requested(CHAT, 2)
                with stopped(hung), fleet.replicas(("lo", other.url)):
                    stream = asyncio.create_task(fleet.ask(STREAM))
                    if found_by == "health check":
                        await eventually(lambda: fleet.served.dispatcher.cluster.silent)
                        assert await fleet.total("quantgate_replica_silence", replica="hi-0", state="silent") == 1
                        fleet.registry.move("hi-0", State.FAILED)
                    moved = [await unary, await stream]
                    *_, error = events_in(first + b"".join([piece async for piece in begun]))
                    new = await fleet.ask(HELLO)
    assert [each.status_code for each in moved] == [200, 200]
    assert [each.headers["x-quantgate-variant"] for each in moved] == ["lo", "lo"]
    assert text_of(events_in(moved[1].content))
    assert error["error"]["code"] == "upstream_timeout"
    assert "hangs" in error["error"]["message"]
    assert (new.headers["x-quantgate-variant"], new.headers["x-quantgate-attempts"]) == ("lo", "1")


async def test_a_replica_with_slow_metrics_keeps_its_stream() -> None:
    """Its page of metrics does not come, but its tokens do: it is neither silent nor hung."""
    async with running_gateway(deployment()) as fleet, running_fake("--fake-tokens-per-second", "4") as slow:
        with fleet.replicas(("hi", slow.url)):
            await eventually(lambda: slow.requests("/metrics"))
            await slow.change_metrics(stall=True)
            answer = await fleet.ask(STREAM)
            assert "hi-0" not in fleet.served.dispatcher.cluster.silent
            assert await fleet.total("quantgate_replica_polls_total", outcome="failed") >= 2
    assert answer.content.endswith(b"data: [DONE]\n\n")
