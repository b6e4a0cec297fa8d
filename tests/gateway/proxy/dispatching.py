"""A dispatch with replicas that a test puts there, and a clock that it moves."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

from config.schema import NO_FLOOR, QueueSettings, RetrySettings
from config.variant import QualityMeasures, Variant
from gateway.errors import GatewayError
from gateway.observability.metrics import Metrics
from gateway.proxy.dispatcher import Dispatcher
from gateway.proxy.leases import Lease, Want
from gateway.proxy.load.tracker import UNMEASURED, LoadTracker
from gateway.routing.cluster_state import NOBODY
from gateway.routing.request import NOTHING_KNOWN, Ask
from gateway.routing.speed import SpeedProfile
from gateway.routing.target import Target
from serving.registry import Registry
from serving.replica import Replica, State

HI = Variant("hi", "bf16", QualityMeasures("parent", 0.0, 1.0, 1.0))
LO = Variant("lo", "int4", QualityMeasures("measured", 0.05, 0.92, 1.05))
LONG_SECONDS = 1000.0
# A future that is done wakes its task in the next turn of the loop, which may wake another one.
TURNS = 6


@dataclass
class House:
    """Leases are taken by tasks, as requests do, and kept until the test ends them."""

    dispatch: Dispatcher
    registry: Registry
    now: list[float]
    loads: LoadTracker
    metrics: Metrics
    order: list[str] = field(default_factory=list)  # who got a lease, by name

    def come(
        self, name: str = "hi-0", state: State = State.READY, max_in_flight: int = 1, reason: str = "", **more: int
    ) -> None:
        """Put a replica, named variant-number, into the registry."""
        variant = name.partition("-")[0]
        replica = Replica(name, variant, "any", f"http://{name}", "m1", max_in_flight=max_in_flight)
        self.registry.put(replace(replica, **more), state, reason)  # type: ignore[arg-type]

    def ask(
        self,
        key: str = "k",
        *rungs: Variant,
        wait_seconds: float = LONG_SECONDS,
        body_bytes: int = 1,
        alias: str = "smol",
        tried: frozenset[str] = NOBODY,
        failure: GatewayError | None = None,
        prompt: Ask = NOTHING_KNOWN,
    ) -> "asyncio.Task[Lease]":
        """Ask for a lease with a key."""
        names = rungs or (HI,)

        async def asked() -> Lease:
            target = Target(alias, names, NO_FLOOR, pinned=False)
            lease = await self.dispatch.lease(
                Want(target, names, self.dispatch.arrived(), prompt, key, body_bytes=body_bytes),
                wait_seconds=wait_seconds,
                tried=tried,
                failure=failure,
            )
            self.order.append(key)
            return lease

        return asyncio.get_running_loop().create_task(asked())

    async def asked(self, count: int, key: str = "k", **options: float) -> "list[asyncio.Task[Lease]]":
        """Ask so often, in a row, and let it settle."""
        tasks = [self.ask(key, **options) for _ in range(count)]  # type: ignore[arg-type]
        await settled()
        return tasks

    async def held(self, *rungs: Variant) -> Lease:
        """Take a lease that is free."""
        task = self.ask("first", *rungs)
        await settled()
        return task.result()

    def load(self) -> dict[str, int]:
        """Requests by replica."""
        return dict(self.registry.in_flight)


@asynccontextmanager
async def house(
    queue: QueueSettings | None = None,
    retries: RetrySettings | None = None,
    speeds: Mapping[str, SpeedProfile] = UNMEASURED,
) -> AsyncIterator[House]:
    """A dispatch; in the end nobody waits, and nothing is in flight."""
    now = [0.0]
    registry, metrics = Registry(), Metrics()
    loads = LoadTracker(registry.in_flight, speeds, lambda: now[0])
    settings = queue or QueueSettings(), retries or RetrySettings()
    with Dispatcher(registry, loads, metrics, *settings, lambda: now[0]) as dispatch:
        made = House(dispatch, registry, now, loads, metrics)
        yield made
        await settled()
        assert (made.load(), dict(dispatch.waiting())) == ({}, {})
        outlooks = [each for variant in registry.ready for each in loads.outlooks(variant)]
        assert all((each.in_flight, each.ahead_seconds) == (0, 0) for each in outlooks)
        assert not any(stay.running for stay in dispatch.memory.stays().values())


async def settled() -> None:
    """Let every task go on until it waits for something."""
    for _ in range(TURNS):
        await asyncio.sleep(0)


def end(lease: Lease, how: str = "succeeded", retry_after_seconds: float | None = None) -> None:
    """End a lease: succeeded, failed, refused, or abandoned."""
    with lease:
        if how == "refused":
            lease.refused(retry_after_seconds)
        elif how != "abandoned":
            getattr(lease, how)()
