"""Replicas behind a gateway go over to another configuration, and requests with them, in an order that loses none."""

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
PATIENCE_SECONDS = 900.0

# What is wanted, and what makes requests go by it from now on.
ApplyDeployment = Callable[[Deployment, Callable[[], None]], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class SupervisedReload:
    """Replicas that this process runs, beside those that somebody else runs."""

    watch: Watch
    own: OwnReplicas

    async def take(self, deployment: Deployment, swap: Callable[[], None]) -> None:
        """New replicas get ready, then requests go by the new configuration, then the old replicas go."""
        foreign = deployment.wanted.foreign
        self.watch.goldens = goldens(deployment.variants)
        self.watch.add(foreign)
        await self.own.update(deployment.wanted, swap)
        self.watch.keep_only(foreign)


@dataclass(frozen=True, slots=True)
class FollowerReload:
    """Replicas that other processes run: when they are there is theirs to say."""

    watch: Watch
    follower: Follower | None
    registry: Registry
    live_config: LiveConfig
    patience_seconds: float = PATIENCE_SECONDS

    async def take(self, deployment: Deployment, swap: Callable[[], None]) -> None:
        """Requests go by the new configuration as soon as no alias loses its last replica by it."""
        foreign = deployment.wanted.foreign
        self.watch.goldens = goldens(deployment.variants)
        self.watch.add(foreign)
        if self.follower is not None:
            keys = {**self.follower.keys, **own_keys(deployment.settings.replicas)}
            self.follower.admit(self.follower.variants | frozenset(deployment.variants), keys)
        after = Catalog(deployment.settings.aliases, deployment.variants)
        await self._until_nothing_is_lost(self.live_config.catalog, after)
        swap()
        if self.follower is not None:
            self.follower.admit(frozenset(deployment.variants), own_keys(deployment.settings.replicas))
        self.watch.keep_only(foreign)

    async def _until_nothing_is_lost(self, before: Catalog, after: Catalog) -> None:
        try:
            async with asyncio.timeout(self.patience_seconds):
                told = False
                while lost := unserved_aliases(before, after, self._ready()):
                    if not told:
                        names = ", ".join(lost)
                        log.info("the configuration waits for replicas: nothing it has is ready for %s", names)
                        told = True
                    await self.registry.changed()
        except TimeoutError:
            log.warning("no replica for %s after %g s; the configuration is taken over", lost, self.patience_seconds)

    def _ready(self) -> set[str]:
        return {each.replica.variant for each in self.registry.snapshot() if each.state is State.READY}
