"""A gateway with an alias for each row of a table, and a scripted replica behind each alias."""

from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager

from gateway.keys import Keys
from serving.replica import Replica, State
from tests.gateway.fleet import Fleet, deployment, running_gateway
from tests.gateway.wire import Behaviour, scripted

TIMEOUTS = {
    "connect_seconds": 2,
    "first_byte_seconds": 1,
    "idle_seconds": 1,
    "total_seconds": 5,
    "queue_seconds": 0.5,
    "heartbeat_seconds": 0,
}


@asynccontextmanager
async def rows(table: Mapping[str, Behaviour | str | None], keys: Keys | None = None) -> AsyncIterator[Fleet]:
    """Serve each name with a behaviour, with a replica at a url, or (None) with nobody."""
    changes = {
        "variants": {f"v-{name}": {"precision": "bf16"} for name in table},
        "aliases": {name: {"ladder": [f"v-{name}"], "timeouts": TIMEOUTS} for name in table},
    }
    async with AsyncExitStack() as stack:
        fleet: Fleet = await stack.enter_async_context(running_gateway(deployment(changes, keys)))
        for name, behind in table.items():
            if behind is None:
                continue
            url = behind if isinstance(behind, str) else (await stack.enter_async_context(scripted(behind))).url
            fleet.registry.put(Replica(f"r-{name}", f"v-{name}", "bf16", url, "m1"), State.READY)
        yield fleet
        await fleet.at_rest()
