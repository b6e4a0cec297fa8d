"""Applies a changed configuration to the replicas and then to requests, in an order that loses no request."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from config.variant import goldens
from gateway.deployment import Deployment
from gateway.live_config import LiveConfig, unserved_aliases
from gateway.routing.target import Catalog
from serving.app import OwnReplicas
from serving.registry import Registry
from serving.replica import State, own_keys
from serving.state.follower import Follower
from serving.watch import Watch

log = logging.getLogger(__name__)

# As long as a replica may take to start.
WAIT_SECONDS = 900.0

# Called with the new deployment and with a function that switches requests over to it.
ApplyDeployment = Callable[[Deployment, Callable[[], None]], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class SupervisedReload:
    """Reload where this process runs the replicas, beside external ones (`url`)."""

    watch: Watch
    own: OwnReplicas

    async def apply(self, deployment: Deployment, swap: Callable[[], None]) -> None:
        """Start new replicas, call `swap` when they are ready, then stop the old ones."""
        external = deployment.wanted.foreign
        self.watch.goldens = goldens(deployment.variants)
        self.watch.add(external)
        await self.own.update(deployment.wanted, swap)
        self.watch.keep_only(external)


@dataclass(frozen=True, slots=True)
class FollowerReload:
    """Reload where other processes run the replicas and decide when they start and stop."""

    watch: Watch
    follower: Follower | None
    registry: Registry
    live_config: LiveConfig
    wait_seconds: float = WAIT_SECONDS

    async def apply(self, deployment: Deployment, swap: Callable[[], None]) -> None:
        """Call `swap` as soon as no alias would lose its last ready replica, or after `wait_seconds`."""
        external = deployment.wanted.foreign
        self.watch.goldens = goldens(deployment.variants)
        self.watch.add(external)
        if self.follower is not None:
            keys = {**self.follower.keys, **own_keys(deployment.settings.replicas)}
            self.follower.admit(self.follower.variants | frozenset(deployment.variants), keys)
        after = Catalog(deployment.settings.aliases, deployment.variants)
        await self._wait_until_served(self.live_config.catalog, after)
        swap()
        if self.follower is not None:
            self.follower.admit(frozenset(deployment.variants), own_keys(deployment.settings.replicas))
        self.watch.keep_only(external)

    async def _wait_until_served(self, before: Catalog, after: Catalog) -> None:
        try:
            async with asyncio.timeout(self.wait_seconds):
                logged = False
                while unserved := unserved_aliases(before, after, self._ready_variants()):
                    if not logged:
                        log.info("reload waits for ready replicas of the new configuration for %s", ", ".join(unserved))
                        logged = True
                    await self.registry.changed()
        except TimeoutError:
            names = ", ".join(unserved)
            log.warning("no ready replica for %s after %g s; applying the configuration", names, self.wait_seconds)

    def _ready_variants(self) -> set[str]:
        return {status.replica.variant for status in self.registry.snapshot() if status.state is State.READY}
