"""Options of the gateway that a reload changes while it runs."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from config.schema import GatewaySettings
from gateway.app import gateway, listen_sockets
from serving.registry import Registry
from serving.replica import State
from tests.fakes.running import FakeReplica, eventually, running_fake
from tests.gateway.fleet import STREAM, Fleet, clients, deployment, error_of, running_gateway

pytestmark = pytest.mark.asyncio(loop_scope="session")

LISTEN = {"listen": "127.0.0.1:0", "admin": "127.0.0.1:0"}


@asynccontextmanager
async def fleet_with(**options: Any) -> AsyncIterator[Fleet]:
    """A gateway with some options."""
    async with running_gateway(deployment({"gateway": {**LISTEN, **options}})) as fleet:
        yield fleet


def switch(fleet: Fleet, **options: Any) -> None:
    """Do what a reload does when the file has these options now."""
    fleet.served.switch(deployment({"gateway": {**LISTEN, **options}}))


async def test_memory_bytes(fake: FakeReplica) -> None:
    """Bodies are held against the new limit."""
    async with fleet_with() as fleet:
        with fleet.replicas(("hi", fake.url)):
            assert (await fleet.ask()).status_code == 200
            switch(fleet, memory_bytes=10)
            assert (await fleet.ask()).status_code == 429
            switch(fleet)
            assert (await fleet.ask()).status_code == 200


async def test_queue(fake: FakeReplica) -> None:
    """A request that waits already stays, the next one is held against the new limit."""
    async with fleet_with() as fleet:
        with fleet.replicas(("hi", fake.url), state=State.STARTING):
            waiting = asyncio.create_task(fleet.ask())
            await eventually(fleet.served.dispatcher.waiting)
            switch(fleet, queue={"per_alias": 0})
            refused = await fleet.ask()
            assert (refused.status_code, error_of(refused)["code"]) == (429, "queue_full")
            assert not waiting.done()
            ready = next(iter(fleet.registry.snapshot())).replica
            fleet.registry.put(ready, State.READY)
            assert (await waiting).status_code == 200


async def test_retries(fake: FakeReplica) -> None:
    """Without a budget a failed request is not tried again; with one it is, from the next request on."""
    async with fleet_with() as fleet, running_fake("--fake-fail-first", "2", "--fake-fail-status", "500") as failing:
        with fleet.replicas(("hi", failing.url), ("mid", fake.url)):
            switch(fleet, retries={"share": 0, "burst": 0})
            assert (await fleet.ask()).status_code == 502
            switch(fleet, retries={"share": 1, "burst": 5})
            answer = await fleet.ask()
            assert (answer.status_code, answer.headers["x-quantgate-attempts"]) == (200, "2")


async def test_drain_seconds() -> None:
    """A request that runs when the gateway stops is cut off after the new time, not after the one at the start."""
    deployed, registry = deployment(), Registry()
    with listen_sockets(deployed.settings.gateway) as taken:
        async with running_fake("--fake-stall-after-tokens", "1") as stalling, AsyncExitStack() as stopping:
            served = await stopping.enter_async_context(gateway(deployed, registry, taken))
            async with clients(served.addresses) as both:
                fleet = Fleet(served, registry, *both)
                with fleet.replicas(("hi", stalling.url)):
                    running = asyncio.create_task(fleet.ask(STREAM))
                    await stalling.requested("/v1/chat/completions")
                    switch(fleet, drain_seconds=0)
                    async with asyncio.timeout(GatewaySettings().drain_seconds / 2):
                        await stopping.aclose()
                        await asyncio.gather(running, return_exceptions=True)
