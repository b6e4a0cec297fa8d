"""Draining of a replica whose requests come from gateways in other processes, too."""

import asyncio
from typing import Protocol

from serving.probe import Probe
from serving.registry import Registry
from serving.replica import Replica

POLL_SECONDS = 0.25
IDLE_POLLS = 2


class TrafficDrain(Protocol):
    """Knows which gateways send requests to a replica.

    ================================  ========================================================
    state of the replica              `wait_deregistered` returns
    ================================  ========================================================
    not ready, such as draining       when every live gateway has read that, or after the limit
    ready                             after the limit: change its state first
    ================================  ========================================================
    """

    async def wait_deregistered(self, replica_id: str) -> None:
        """Wait until no gateway chooses this replica any more, at most a few seconds."""


async def drain(
    replica: Replica, registry: Registry, probe: Probe, traffic: TrafficDrain | None, limit_seconds: float
) -> bool:
    """Wait until a draining replica has no requests any more; False after `limit_seconds`.

    Requests of this process are counted in the registry, those of other processes only by the replica itself. Without
    `traffic` all senders read this registry and know of a change at once.
    """
    try:
        async with asyncio.timeout(limit_seconds):
            if traffic is not None:
                await traffic.wait_deregistered(replica.id)
            await registry.idle(replica.id)
            await _wait_idle(replica, probe)
    except TimeoutError:
        return False
    return True


async def _wait_idle(replica: Replica, probe: Probe) -> None:
    """Poll until the engine is idle twice in a row: a request may be in flight to it. No answer counts as idle."""
    idle_polls = 0
    while idle_polls < IDLE_POLLS:
        await asyncio.sleep(POLL_SECONDS)
        idle_polls = 0 if await probe.requests_in_engine(replica) else idle_polls + 1
