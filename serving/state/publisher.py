"""Publishes the registry to the state database, and tracks which gateways have read it."""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from serving.defects import logged_defects
from serving.errors import NoSuchReplica, StateAway
from serving.registry import Registry
from serving.replica import KUBERNETES, ReplicaStatus, State
from serving.state.database import FollowerAck, Owner, PublishReceipt, ReplicaRecord
from serving.state.link import Link

log = logging.getLogger(__name__)

BEAT_SECONDS = 1.0
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.1, 2.0
ROTATION_SECONDS = 5.0
ROTATION_LOOK_SECONDS = 0.1
SILENT_SECONDS = 5.0  # a follower writes a heartbeat every 2 s


@dataclass(slots=True)
class Publisher:
    """Mirrors a registry into the state database while the `async with` block runs; a `TrafficDrain` for supervisors.

    Each write has all replicas of this process, so a database that was unavailable or deleted is right again with the
    next one. `external` replicas are in the registry, but not published.
    """

    owner: Owner
    registry: Registry
    link: Link
    external: frozenset[str] = frozenset()
    processes: Callable[[], Mapping[str, int]] = dict
    clock: Callable[[], float] = time.monotonic
    wall_clock: Callable[[], float] = time.time
    _away: bool = False
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _one_at_a_time: asyncio.Lock = field(default_factory=asyncio.Lock)
    _followers: dict[str, tuple[FollowerAck, float]] = field(default_factory=dict)
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    async def __aenter__(self) -> Self:
        """Start to mirror."""
        self._tasks = [
            asyncio.create_task(self._listen(), name="listen to the registry"),
            asyncio.create_task(self._mirror(), name="mirror the registry into the state database"),
        ]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Withdraw the replicas."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        try:
            await self.link.call(self.link.database.withdraw, self.owner.id)
        except StateAway as away:
            log.warning("%s; the replicas of this process stay published, and gateways will find them gone", away)
        self.link.close()

    async def wait_deregistered(self, replica_id: str) -> None:
        """Wait until every live gateway has acknowledged a revision in which this replica is not ready."""
        try:
            async with asyncio.timeout(ROTATION_SECONDS):
                while not await self._is_acknowledged(replica_id):  # noqa: ASYNC110 - it polls a database
                    await asyncio.sleep(ROTATION_LOOK_SECONDS)
        except TimeoutError:
            log.warning("not every gateway acknowledged that replica %s is leaving; continuing", replica_id)

    async def _is_acknowledged(self, replica_id: str) -> bool:
        try:
            receipt = await self._exchange()
        except StateAway:
            return not self._live_followers()
        with suppress(NoSuchReplica):
            if self.registry.status(replica_id).state is State.READY:
                return False
        needed = receipt.revisions.get(replica_id, receipt.revision)
        return all(follower.revision >= needed for follower in self._live_followers())

    async def _listen(self) -> None:
        while True:
            await self.registry.changed()
            self._changed.set()

    async def _mirror(self) -> None:
        pause = FIRST_PAUSE_SECONDS
        while True:
            self._changed.clear()
            written, reached = self._states(), False
            with logged_defects("publishing replicas"):
                reached = await self._publish()
            if reached:
                pause = FIRST_PAUSE_SECONDS
                await self._wait_for_change_or_heartbeat(written)
            else:
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    async def _publish(self) -> bool:
        """Publish the current state; return whether the database could be written."""
        try:
            await self._exchange()
        except StateAway as away:
            if not self._away:
                log.warning("%s; replicas keep running; retrying", away)
            self._away = True
            return False
        if self._away:
            log.info("the state database %s is available again", self.link.database.engine.name)
        self._away = False
        return True

    async def _wait_for_change_or_heartbeat(self, written: list[tuple[object, ...]]) -> None:
        """Wait for a change to publish or the next heartbeat; ends of requests are announced, but not published."""
        with suppress(TimeoutError):
            async with asyncio.timeout(BEAT_SECONDS):
                while self._states() == written:
                    self._changed.clear()
                    await self._changed.wait()

    async def _exchange(self) -> PublishReceipt:
        """Publish the current state and read the followers; one at a time, so that writes keep their order."""
        async with self._one_at_a_time:
            database, records = self.link.database, self._records()
            receipt = await self.link.call(database.publish, self.owner, records, self.wall_clock())
        self._update_followers(receipt.followers)
        return receipt

    def _records(self) -> tuple[ReplicaRecord, ...]:
        processes = self.processes()
        wall_offset = self.wall_clock() - self.clock()
        return tuple(
            ReplicaRecord(
                status.replica,
                status.state,
                status.reason,
                wall_offset + status.since_seconds,
                processes.get(status.replica.id),
            )
            for status in self.registry.snapshot()
            if self._is_published(status)
        )

    def _is_published(self, status: ReplicaStatus) -> bool:
        if status.source == KUBERNETES:
            return False  # each gateway finds pods itself
        return status.replica.id not in self.external and status.replica.external is None

    def _update_followers(self, followers: tuple[FollowerAck, ...]) -> None:
        now, known = self.clock(), self._followers
        beats = {name: ack.beat for name, (ack, _) in known.items()}
        self._followers = {
            ack.id: (ack, known[ack.id][1] if beats.get(ack.id) == ack.beat else now) for ack in followers
        }

    def _live_followers(self) -> list[FollowerAck]:
        now = self.clock()
        return [follower for follower, last_seen in self._followers.values() if now - last_seen <= SILENT_SECONDS]

    def _states(self) -> list[tuple[object, ...]]:
        """What is published at once when it changes; the rest waits for the next heartbeat."""
        everything = self.registry.snapshot()
        return [(status.replica, status.state, status.reason) for status in everything if self._is_published(status)]
