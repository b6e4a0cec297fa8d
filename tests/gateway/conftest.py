"""The gateway under test: one for all tests that need nothing special of it, checked for leaks after each."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping

import pytest
import pytest_asyncio
import uvloop

from tests.fakes.running import DEADLINE_SECONDS, FakeReplica, running_fake
from tests.gateway.fleet import Fleet, deployment, running_gateway


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The gateway's own kind of loop: its transports differ from asyncio's."""
    return {"uvloop": uvloop.new_event_loop}


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def shared_gateway() -> AsyncIterator[Fleet]:
    """The gateway itself; tests take `fleet`."""
    async with running_gateway(
        deployment({"gateway": {**LISTEN, "limits": LIMITS, "retries": {"share": 1, "burst": 1000}}})
    ) as fleet:
        yield fleet


LISTEN = {"listen": "127.0.0.1:0", "admin": "127.0.0.1:0"}
LIMITS = {"body_bytes": "64KiB", "n": 4, "queue_seconds": DEADLINE_SECONDS}


@pytest_asyncio.fixture(loop_scope="session")
async def fleet(shared_gateway: Fleet) -> AsyncIterator[Fleet]:
    """A gateway without replicas; after the test nothing may be in flight."""
    assert not shared_gateway.registry.snapshot()
    yield shared_gateway
    await shared_gateway.at_rest()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def fake() -> AsyncIterator[FakeReplica]:
    """A fake vLLM that does nothing wrong."""
    async with running_fake() as replica:
        yield replica
