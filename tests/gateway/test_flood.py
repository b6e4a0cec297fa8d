"""A flood of requests of one key does not starve another key."""

import asyncio
import json
from collections import Counter

import pytest

from gateway.keys import StoredKey, keys_in_force
from serving.replica import Replica, State
from tests.fakes.running import DEADLINE_SECONDS
from tests.gateway.fleet import HELLO, Fleet, deployment, running_gateway
from tests.gateway.keys.test_keys import digest
from tests.gateway.proxy.recorded import WHOLE
from tests.gateway.wire import Peer, scripted, whole

pytestmark = pytest.mark.asyncio(loop_scope="session")

KEYS = keys_in_force({name: StoredKey(sha256=(digest(f"qg-{name}"),)) for name in ("flood", "quiet")})
FLOOD = 60
QUIET = 5
MAX_IN_FLIGHT = 2


async def ask(fleet: Fleet, name: str, number: int) -> int:
    """Send a request with a key; returns the status."""
    body = {**HELLO, "user": f"{name}-{number}"}
    return (await fleet.ask(body, {"authorization": f"Bearer qg-{name}"})).status_code


async def test_a_flood_does_not_starve_another_key() -> None:
    """The keys take turns: one answer each, until the quiet key has all of its answers."""
    order: list[str] = []
    gate = asyncio.Event()

    async def behaviour(peer: Peer) -> None:
        while True:
            request = await peer.request()
            await gate.wait()
            order.append(json.loads(request.partition(b"\r\n\r\n")[2])["user"].partition("-")[0])
            await peer.say(whole(WHOLE))

    async with scripted(behaviour) as replica, running_gateway(deployment(keys=KEYS)) as fleet:
        fleet.registry.put(Replica("r", "hi", "bf16", replica.url, "m1", max_in_flight=MAX_IN_FLIGHT), State.READY)
        async with asyncio.TaskGroup() as group, asyncio.timeout(DEADLINE_SECONDS):
            flood = [group.create_task(ask(fleet, "flood", number)) for number in range(FLOOD)]
            await waiting(fleet, FLOOD)
            quiet = [group.create_task(ask(fleet, "quiet", number)) for number in range(QUIET)]
            await waiting(fleet, FLOOD + QUIET)
            gate.set()
    assert {task.result() for task in (*flood, *quiet)} == {200}
    assert Counter(order) == {"flood": FLOOD, "quiet": QUIET}
    last = max(number for number, name in enumerate(order) if name == "quiet")
    # What the flood had in flight before, then one of each in turn.
    assert last < MAX_IN_FLIGHT + 2 * QUIET + MAX_IN_FLIGHT


async def waiting(fleet: Fleet, count: int) -> None:
    """Wait until this many requests are in flight or queued."""
    while await fleet.total("quantgate_requests_in_flight") < count:
        pass
