"""Whether a gateway knows its replicas well enough to take over from the one that runs."""

import asyncio
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager

from serving.errors import TakeoverRefused
from serving.registry import Registry
from serving.replica import CONFIGURATION, ReplicaStatus, State

WITHIN_SECONDS = 60.0


@asynccontextmanager
async def verified_replicas(
    registry: Registry, awaited: frozenset[str], *, required: bool, within_seconds: float = WITHIN_SECONDS
) -> AsyncIterator[None]:
    """Enter when the replicas are verified, as `unverified` says; TakeoverRefused after `within_seconds`."""
    try:
        async with asyncio.timeout(within_seconds):
            while reason := unverified(registry.snapshot(), awaited, required=required):
                await registry.changed()
    except TimeoutError:
        raise TakeoverRefused(f"{reason} after {within_seconds:g} s; the gateway that runs goes on") from None
    yield


def unverified(replicas: Collection[ReplicaStatus], awaited: frozenset[str], *, required: bool) -> str:
    """Return why a gateway with these replicas must not take over yet; empty if it may.

    Each replica of the configuration must have been reached, or have failed. Those in `awaited` must be ready, unless
    the configuration has them no more. `required`: at least one must be ready.
    """
    for status in replicas:
        unreached = status.source == CONFIGURATION and status.state is State.STARTING
        if unreached or (status.replica.id in awaited and status.state is not State.READY):
            return f"replica {status.replica.id} is {status.state} here ({status.reason})"
    if required and not any(status.state is State.READY for status in replicas):
        return "no replica is ready here"
    return ""
