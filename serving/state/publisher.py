"""Tells the state database what our registry says, and learns which gateways have read it."""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from serving.errors import NoSuchReplica, StateAway
from serving.registry import Registry
from serving.replica import State
from serving.state.database import Owner, Published, Seen, Told
from serving.state.link import Link

log = logging.getLogger(__name__)

BEAT_SECONDS = 1.0
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.1, 2.0
ROTATION_SECONDS = 5.0
ROTATION_LOOK_SECONDS = 0.1
SILENT_SECONDS = 5.0  # a follower beats every two


@dataclass(slots=True)
class Publisher:
    """Mirrors a registry into the state database while the `async with` block runs; a `Rotation` for supervisors.

    What is written is always the whole truth about our replicas, so a database that was away, or deleted, is right
    again with the next beat. `foreign` replicas are in the registry, but not ours to tell of.
    """

    owner: Owner
    registry: Registry
    link: Link
    foreign: frozenset[str] = frozenset()
    processes: Callable[[], Mapping[str, int]] = dict
    clock: Callable[[], float] = time.monotonic
    wall_clock: Callable[[], float] = time.time
    _away: bool = False
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _one_at_a_time: asyncio.Lock = field(default_factory=asyncio.Lock)
    _followers: dict[str, tuple[Seen, float]] = field(default_factory=dict)
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    async def __aenter__(self) -> Self:
        """Begin to mirror."""
        self._tasks = [
            asyncio.create_task(self._listen(), name="listen to the registry"),
            asyncio.create_task(self._mirror(), name="mirror the registry into the state database"),
        ]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take our replicas out of the database."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        try:
            await self.link.call(self.link.database.withdraw, self.owner.id)
        except StateAway as away:
            log.warning("%s; it keeps telling of our replicas, which gateways will find gone", away)
        self.link.close()

    async def out_of_rotation(self, replica_id: str) -> None:
        """Wait until every gateway that lives acts on a picture in which this replica is not ready."""
        try:
            async with asyncio.timeout(ROTATION_SECONDS):
                while not await self._everybody_knows(replica_id):  # noqa: ASYNC110 - what is looked at is a database
                    await asyncio.sleep(ROTATION_LOOK_SECONDS)
        except TimeoutError:
            log.warning("not every gateway has said that it knows of replica %s leaving; going on", replica_id)

    async def _everybody_knows(self, replica_id: str) -> bool:
        try:
            published = await self._exchange()
        except StateAway:
            return not self._live_followers()
        with suppress(NoSuchReplica):
            if self.registry.status(replica_id).state is State.READY:
                return False
        needed = published.revisions.get(replica_id, published.revision)
        return all(follower.revision >= needed for follower in self._live_followers())

    async def _listen(self) -> None:
        while True:
            await self.registry.changed()
            self._changed.set()

    async def _mirror(self) -> None:
        pause = FIRST_PAUSE_SECONDS
        while True:
            self._changed.clear()
            written = self._states()
            try:
                await self._exchange()
            except StateAway as away:
                if not self._away:
                    log.warning("%s; replicas go on, and it is told again", away)
                self._away = True
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
                continue
            if self._away:
                log.info("the state database %s is back", self.link.database.engine.name)
            self._away, pause = False, FIRST_PAUSE_SECONDS
            await self._news_or_beat(written)

    async def _news_or_beat(self, written: list[tuple[object, ...]]) -> None:
        """Wait until there is something to write; that a request has ended, which is announced too, is nothing."""
        with suppress(TimeoutError):
            async with asyncio.timeout(BEAT_SECONDS):
                while self._states() == written:
                    self._changed.clear()
                    await self._changed.wait()

    async def _exchange(self) -> Published:
        """Write what is so now, and read who follows; one at a time, so that an older truth never comes later."""
        async with self._one_at_a_time:
            database, told = self.link.database, self._tell()
            published = await self.link.call(database.publish, self.owner, told, self.wall_clock())
        self._hear(published.followers)
        return published

    def _tell(self) -> tuple[Told, ...]:
        processes = self.processes()
        past = self.wall_clock() - self.clock()
        return tuple(
            Told(each.replica, each.state, each.reason, past + each.since_seconds, processes.get(each.replica.id))
            for each in self.registry.snapshot()
            if each.replica.id not in self.foreign
        )

    def _hear(self, followers: tuple[Seen, ...]) -> None:
        now, heard = self.clock(), self._followers
        beats = {name: seen.beat for name, (seen, _) in heard.items()}
        self._followers = {
            each.id: (each, heard[each.id][1] if beats.get(each.id) == each.beat else now) for each in followers
        }

    def _live_followers(self) -> list[Seen]:
        now = self.clock()
        return [follower for follower, heard in self._followers.values() if now - heard <= SILENT_SECONDS]

    def _states(self) -> list[tuple[object, ...]]:
        """What is news when it changes; the rest is as good when the next beat brings it."""
        everything = self.registry.snapshot()
        return [(each.replica, each.state, each.reason) for each in everything if each.replica.id not in self.foreign]
