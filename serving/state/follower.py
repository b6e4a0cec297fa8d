"""Mirrors the replicas of other processes' supervisors from the state database into the registry, within a second.

While the database is unavailable, the last snapshot remains and ready replicas are health-checked directly. See
`tracking.effective_state` for the rules.
"""

import asyncio
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from serving.defects import logged_defects
from serving.errors import ReplicaConflict, StateAway
from serving.probe import Probe
from serving.registry import Registry, ReplicaSource
from serving.replica import STATE_DATABASE, State
from serving.state.database import Heartbeat
from serving.state.link import Link
from serving.state.tracking import MISSES, EffectiveState, Silence, TrackedReplica, effective_state, orphans, track

log = logging.getLogger(__name__)

POLL_SECONDS = 0.25
LONGEST_PAUSE_SECONDS = 2.0
BEAT_SECONDS = 2.0
SILENT_SECONDS = 5.0
PROBE_SECONDS = 1.0


@dataclass(slots=True)
class Follower:
    """Keeps the registry up to date with the state database while the `async with` block runs."""

    link: Link
    registry: Registry
    probe: Probe
    variants: frozenset[str]
    keys: Mapping[str, str]
    host: str = field(default_factory=socket.gethostname)
    silent_seconds: float = SILENT_SECONDS
    probe_seconds: float = PROBE_SECONDS
    clock: Callable[[], float] = time.monotonic
    wall_clock: Callable[[], float] = time.time
    id: str = field(init=False)
    _heartbeat: Heartbeat | None = None
    _tracked: dict[str, TrackedReplica] = field(default_factory=dict)
    _source: ReplicaSource = field(init=False)
    _conflicts: set[str] = field(default_factory=set)
    _last_seen: dict[str, float] = field(default_factory=dict)
    _misses: dict[str, int] = field(default_factory=dict)
    _away: bool = False
    _read_only: bool = False
    _acknowledged: tuple[str, int] | None = None
    _acknowledged_at: float = float("-inf")
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.id = f"{self.host}-{os.getpid()}-{secrets.token_hex(4)}"
        self._source = self.registry.source(STATE_DATABASE)

    async def __aenter__(self) -> Self:
        """Poll once, so that the first request finds replicas; an unavailable database is not an error."""
        await self._poll()
        self._tasks = [
            asyncio.create_task(self._follow(), name="follow the state database"),
            asyncio.create_task(self._check_doubtful(), name="check replicas whose supervisor is silent"),
        ]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop, and remove this follower, so that no supervisor waits for it."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if not self._away:
            try:
                await self.link.call(self.link.database.leave, self.id)
            except StateAway as away:
                log.warning("%s", away)
        self.link.close()

    def admit(self, variants: frozenset[str], keys: Mapping[str, str]) -> None:
        """Change the variants and keys from the next poll on."""
        self.variants, self.keys = variants, keys
        self._heartbeat = None

    async def _follow(self) -> None:
        pause = POLL_SECONDS
        while True:
            await asyncio.sleep(pause)
            reached = False
            with logged_defects("following the state database"):
                reached = await self._poll()
            pause = POLL_SECONDS if reached else min(2 * pause, LONGEST_PAUSE_SECONDS)

    async def _poll(self) -> bool:
        """Read changes, update the registry, and acknowledge; return whether the database could be read."""
        try:
            await self._read_changes()
        except StateAway as away:
            if not self._away:
                log.warning("%s; replicas keep their last state; retrying", away)
            self._away = True
        self._update_registry()
        if not self._away:
            await self._send_acknowledgement()
        return not self._away

    async def _read_changes(self) -> None:
        heartbeat = await self.link.call(self.link.database.heartbeat)
        if self._has_changes(heartbeat):
            await self._take_picture()
        else:
            self._record_heartbeats(heartbeat)
        if self._away:
            log.info("the state database %s is available again", self.link.database.engine.name)
        self._away = False

    def _has_changes(self, heartbeat: Heartbeat) -> bool:
        last = self._heartbeat
        if last is None or (last.epoch, last.revision) != (heartbeat.epoch, heartbeat.revision):
            return True
        return {owner.id for owner in last.owners} != {owner.id for owner in heartbeat.owners}

    async def _take_picture(self) -> None:
        snapshot = await self.link.call(self.link.database.snapshot)
        recreated = self._heartbeat is not None and self._heartbeat.epoch != snapshot.heartbeat.epoch
        self._record_heartbeats(snapshot.heartbeat)
        tracked = track(snapshot, self.variants, self.keys, self.host)
        owners = {replica.owner.id for replica in self._tracked.values()}
        lost = frozenset(owner for owner in owners if recreated or self._silent(owner))
        self._tracked = tracked | orphans(self._tracked, tracked, lost)
        self._last_seen = {owner.id: self._last_seen[owner.id] for owner in snapshot.heartbeat.owners}

    def _record_heartbeats(self, heartbeat: Heartbeat) -> None:
        """Update when each supervisor was last seen; after an outage of the database none counts as silent."""
        before = {owner.id: owner.beat for owner in self._heartbeat.owners} if self._heartbeat else {}
        now = self.clock()
        for owner in heartbeat.owners:
            if owner.id not in self._last_seen:
                # Its age is only known by the owner's wall clock; if that is wrong, the replica is checked needlessly.
                expired = self.wall_clock() - owner.beat_at > self.silent_seconds
                self._last_seen[owner.id] = float("-inf") if expired else now
            elif self._away or before.get(owner.id) != owner.beat:
                self._last_seen[owner.id] = now
        self._heartbeat = heartbeat

    def _silent(self, owner_id: str) -> bool:
        return self.clock() - self._last_seen.get(owner_id, float("-inf")) > self.silent_seconds

    def _silence(self, tracked: TrackedReplica) -> Silence | None:
        if tracked.orphan:
            return "supervisor"
        if not self._silent(tracked.owner.id):
            return None
        return "database" if self._away else "supervisor"

    def _update_registry(self) -> None:
        """Write the effective state of each tracked replica, and remove the others."""
        with self._source.changing():
            self._write_states()
        self._conflicts &= self._tracked.keys()

    def _write_states(self) -> None:
        for name, tracked in list(self._tracked.items()):
            silence = self._silence(tracked)
            if silence is None:
                self._misses.pop(name, None)
            misses = self._misses.get(name, 0)
            if tracked.orphan and misses >= MISSES:
                log.warning("replica %s is removed: it has no record and does not answer", name)
                del self._tracked[name], self._misses[name]
                continue
            self._put_or_log(tracked, effective_state(tracked, silence, misses))
        self._source.keep_only(self._tracked)

    def _put_or_log(self, tracked: TrackedReplica, effective: EffectiveState) -> None:
        """Update a replica's entry in the registry; while another source owns the id, skip it and log that once."""
        replica = tracked.record.replica
        age_seconds = max(0.0, self.wall_clock() - tracked.record.since)
        since = self.clock() - age_seconds if effective.as_published else None
        try:
            self._source.put(replica, effective.state, effective.reason, since)
        except ReplicaConflict as conflict:
            if replica.id not in self._conflicts:
                log.warning("%s", conflict)
            self._conflicts.add(replica.id)
        else:
            self._conflicts.discard(replica.id)

    async def _send_acknowledgement(self) -> None:
        """Acknowledge a new revision at once, and the same one periodically as a heartbeat."""
        assert self._heartbeat is not None
        acted_on = (self._heartbeat.epoch, self._heartbeat.revision)
        now = self.clock()
        if self._acknowledged == acted_on and now - self._acknowledged_at < BEAT_SECONDS:
            return
        self._acknowledged_at = now  # also if it fails: reading goes on
        try:
            await self.link.call(self.link.database.acknowledge, self.id, *acted_on, self.wall_clock())
        except StateAway as away:
            if not self._read_only:
                log.warning("%s; it is readable but not writable, so supervisors get no acknowledgement", away)
            self._read_only, self._acknowledged = True, None
        else:
            self._read_only, self._acknowledged = False, acted_on

    async def _check_doubtful(self) -> None:
        """Health-check ready replicas while their supervisor or the database is silent."""
        while True:
            with logged_defects("checking replicas whose supervisor is silent"):
                await self._check_doubtful_once()
            await asyncio.sleep(self.probe_seconds)

    async def _check_doubtful_once(self) -> None:
        doubtful = [
            tracked
            for tracked in self._tracked.values()
            if tracked.record.state is State.READY and self._silence(tracked)
        ]
        replicas = [tracked.record.replica for tracked in doubtful]
        answers = await asyncio.gather(*(self.probe.healthy(replica.url, replica.tls) for replica in replicas))
        for replica, healthy in zip(replicas, answers, strict=True):
            self._misses[replica.id] = 0 if healthy else self._misses.get(replica.id, 0) + 1
        if doubtful:
            self._update_registry()
