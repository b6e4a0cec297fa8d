"""The replicas that a configuration and rollouts want together, and the follower of what rollouts want."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Self

from config.schema import ReplicaSettings
from serving.defects import logged_defects
from serving.errors import ServingError, StateAway
from serving.state.database import StateDatabase
from serving.state.link import Link
from serving.state.rollout_records import Demand
from serving.state.rollouts import RolloutDatabase

log = logging.getLogger(__name__)

FOLLOW_SECONDS = 1.0


def with_demands(
    replicas: tuple[ReplicaSettings, ...], demands: Iterable[Demand], variants: Collection[str]
) -> tuple[ReplicaSettings, ...]:
    """Return what is to run: configured replicas, less those that are not wanted, and more of those that are.

    A wanted variant without an entry of its own is launched like the variant that its demand names, on any free port
    and on cores that are free; where that one has no entry either, like the one it was launched like itself. Replicas
    with a `url` or `kubernetes` are never changed: other programs run them.
    """
    wanted = {demand.variant: demand for demand in demands if demand.variant in variants}
    kept = [each for each in replicas if not each.supervised or each.variant not in wanted or wanted[each.variant].run]
    configured = {each.variant for each in replicas}
    for variant, demand in wanted.items():
        if demand.run and variant not in configured:
            own = {"variant": variant, "port": None, "cores": None}
            kept += [each.model_copy(update=own) for each in _models(demand, replicas, wanted)]
    return tuple(kept)


def _models(
    demand: Demand, replicas: tuple[ReplicaSettings, ...], wanted: Mapping[str, Demand]
) -> list[ReplicaSettings]:
    """The entries that a variant is launched like: those of the nearest variant before it that has some."""
    seen = {demand.variant}
    while True:
        found = [each for each in replicas if each.variant == demand.modeled_on and each.supervised]
        earlier = wanted.get(demand.modeled_on)
        if found or earlier is None or earlier.variant in seen:
            return found
        seen.add(earlier.variant)
        demand = earlier


@dataclass(slots=True)
class DemandFollower:
    """Follows what rollouts want of this machine; while the database is away, it stays as it was."""

    current: tuple[Demand, ...] = ()
    link: Link | None = None
    _seen: tuple[str, int] | None = None

    @classmethod
    async def read(cls, state: str | None) -> Self:
        """Read the demands of a state database, if there is one."""
        follower = cls(link=None if state is None else Link(StateDatabase.at(state, create=False)))
        await follower.follow()
        return follower

    async def follow(self) -> bool:
        """Read the demands again; return whether they have changed."""
        if self.link is None:
            return False
        database, before = RolloutDatabase(self.link.database), self.current
        try:
            if (revision := await self.link.call(database.revision)) != self._seen:
                self.current = (await self.link.call(database.snapshot)).demands
                self._seen = revision
        except StateAway as away:
            log.debug("%s", away)  # the publisher says so
        return self.current != before

    @asynccontextmanager
    async def applied(self, apply: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
        """Call `apply` after each change while the block runs."""
        task = asyncio.create_task(self._apply_regularly(apply), name="follow what rollouts want")
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            if self.link is not None:
                self.link.close()

    async def _apply_regularly(self, apply: Callable[[], Awaitable[None]]) -> None:
        while True:
            await asyncio.sleep(FOLLOW_SECONDS)
            with logged_defects("following what rollouts want"):
                if await self.follow():
                    await self._apply(apply)

    async def _apply(self, apply: Callable[[], Awaitable[None]]) -> None:
        wanted = ", ".join(f"{each.variant} {'runs' if each.run else 'stops'}" for each in self.current)
        log.info("rollouts want other replicas: %s", wanted)
        try:
            await apply()
        except ServingError as error:
            log.error("%s", error)  # noqa: TRY400 - the message says it; the rollout has a deadline
