"""Taking a replica out of rotation, when those who rotate are in other processes."""

import asyncio
from typing import Protocol

from serving.probe import Probe
from serving.registry import Registry
from serving.replica import Replica

LOOK_SECONDS = 0.25
QUIET_LOOKS = 2


class Rotation(Protocol):
    """Who knows which gateways send requests to a replica.

    ================================  =========================================================
    the replica's state               `out_of_rotation` returns when
    ================================  =========================================================
    not ready (draining, say)         every gateway that lives knows so, or has had its time
    ready                             it has had its time: ask for the other state first
    ================================  =========================================================
    """

    async def out_of_rotation(self, replica_id: str) -> None:
        """Wait until nobody chooses this replica any more; never longer than a few seconds."""


async def drained(
    replica: Replica, registry: Registry, probe: Probe, rotation: Rotation | None, limit_seconds: float
) -> bool:
    """Wait until a replica that is draining answers nobody any more; False if the limit came first.

    Requests of our own gateway are counted in the registry, those of other processes only by the replica itself.
    Without a rotation only readers of our registry send requests, and they know as soon as it says so.
    """
    try:
        async with asyncio.timeout(limit_seconds):
            if rotation is not None:
                await rotation.out_of_rotation(replica.id)
            await registry.idle(replica.id)
            await _quiet(replica, probe)
    except TimeoutError:
        return False
    return True


async def _quiet(replica: Replica, probe: Probe) -> None:
    """Look twice: a request may be on its way from a gateway while the replica is asked. No answer is quiet, too."""
    quiet = 0
    while quiet < QUIET_LOOKS:
        await asyncio.sleep(LOOK_SECONDS)
        quiet = 0 if await probe.requests_in_engine(replica) else quiet + 1
