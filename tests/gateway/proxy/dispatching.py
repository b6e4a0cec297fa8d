"""A dispatcher with replicas that a test registers, and a clock that the test moves."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

from config.schema import NO_FLOOR, QueueSettings, RetrySettings
from config.variant import QualityMeasures, Variant
from gateway.errors import GatewayError
from gateway.observability.metrics import Metrics
from gateway.proxy.dispatcher import Dispatcher
from gateway.proxy.leases import Lease
from gateway.proxy.load.tracker import UNMEASURED, LoadTracker
from gateway.routing.request import NO_REPLICAS, RoutingRequest
from gateway.routing.speed import SpeedProfile
from gateway.routing.target import Target
from serving.registry import Registry
from serving.replica import Replica, State
from tests.fakes.running import DEADLINE_SECONDS

HI = Variant("hi", "bf16", QualityMeasures("parent", 0.0, 1.0, 1.0))
LO = Variant("lo", "int4", QualityMeasures("measured", 0.05, 0.92, 1.05))
LONG_SECONDS = 1000.0
# A future that is done wakes its task in the next iteration of the loop, which may wake another one.
ITERATIONS = 6


async def lease_or_wait(
    dispatcher: Dispatcher,
    request: RoutingRequest,
    wait_seconds: float,
    *,
    tried: frozenset[str] = NO_REPLICAS,
    failure: GatewayError | None = None,
) -> Lease:
    """Lease a replica for one attempt, as the proxy does; `failure` is raised instead of waiting."""
    request = dispatcher.affinity.refreshed(request, tried)
    if (lease := dispatcher.try_lease(request, wait_seconds)) is not None:
        return lease
    if failure is not None:
        raise failure
    return await dispatcher.wait(request, wait_seconds)


@dataclass
class DispatcherHarness:
    """Tasks take leases, as requests do; a lease runs until the test ends it. `order` has the keys of the leases."""

    dispatcher: Dispatcher
    registry: Registry
    now: list[float]
    load: LoadTracker
    metrics: Metrics
    order: list[str] = field(default_factory=list)

    def add(
        self, name: str = "hi-0", state: State = State.READY, max_in_flight: int = 1, reason: str = "", **changes: int
    ) -> None:
        """Put a replica, named variant-number, into the registry."""
        variant = name.partition("-")[0]
        replica = Replica(name, variant, "any", f"http://{name}", "m1", max_in_flight=max_in_flight)
        self.registry.put(replace(replica, **changes), state, reason)  # type: ignore[arg-type]

    def start(
        self,
        key: str = "k",
        *variants: Variant,
        wait_seconds: float = LONG_SECONDS,
        body_bytes: int = 1,
        alias: str = "smol",
        tried: frozenset[str] = NO_REPLICAS,
        failure: GatewayError | None = None,
        prompt_tokens: float = 0.0,
        session: str | None = None,
        later: bool = False,
    ) -> "asyncio.Task[Lease]":
        """Start a task that takes a lease for a request of an API key."""
        rungs = variants or (HI,)

        async def take() -> Lease:
            request = RoutingRequest(
                Target(alias, rungs, NO_FLOOR, pinned=False),
                rungs,
                self.dispatcher.next_turn(),
                key=key,
                body_bytes=body_bytes,
                prompt_tokens=prompt_tokens,
                session=session,
                later=later,
            )
            lease = await lease_or_wait(self.dispatcher, request, wait_seconds, tried=tried, failure=failure)
            self.order.append(key)
            return lease

        return asyncio.get_running_loop().create_task(take())

    async def start_many(self, count: int, key: str = "k", **options: float) -> "list[asyncio.Task[Lease]]":
        """Start several tasks in a row, and let them settle."""
        tasks = [self.start(key, **options) for _ in range(count)]  # type: ignore[arg-type]
        await settle()
        return tasks

    async def lease_now(self, *variants: Variant) -> Lease:
        """Take a lease that is free."""
        task = self.start("first", *variants)
        await settle()
        return task.result()

    def in_flight(self) -> dict[str, int]:
        """Count the requests of each replica."""
        return dict(self.registry.in_flight)


@asynccontextmanager
async def running_dispatcher(
    queue: QueueSettings | None = None,
    retries: RetrySettings | None = None,
    speeds: Mapping[str, SpeedProfile] = UNMEASURED,
) -> AsyncIterator[DispatcherHarness]:
    """Run a dispatcher; at the end no request may wait, and nothing may be in flight."""
    now = [0.0]
    registry, metrics = Registry(), Metrics()
    load = LoadTracker(registry.in_flight, speeds, lambda: now[0])
    settings = queue or QueueSettings(), retries or RetrySettings()
    with Dispatcher(registry, load, metrics, *settings, lambda: now[0]) as dispatcher:
        harness = DispatcherHarness(dispatcher, registry, now, load, metrics)
        yield harness
        await settle()
        assert (harness.in_flight(), dict(dispatcher.waiting())) == ({}, {})
        estimates = [each for variant in registry.ready for each in load.estimates(variant)]
        assert all((each.in_flight, each.ahead_seconds) == (0, 0) for each in estimates)
        assert not any(placement.running for placement in dispatcher.affinity.placements().values())


async def settle() -> None:
    """Let every task run until it waits for something."""
    for _ in range(ITERATIONS):
        await asyncio.sleep(0)


def end(lease: Lease, outcome: str = "succeeded", retry_after_seconds: float | None = None) -> None:
    """End a lease: succeeded, failed, refused, or abandoned."""
    with lease:
        if outcome == "refused":
            lease.refused(retry_after_seconds)
        elif outcome != "abandoned":
            getattr(lease, outcome)()


async def ended_by_timer(task: "asyncio.Task[Lease]") -> None:
    """Wait for an end that a real timer brings."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        await asyncio.wait([task])
