"""Follows the state database: what other processes' supervisors run stands in our registry within a second.

The database is asked, never obeyed when it is away: then the last good picture stays, and replicas are asked
themselves. See `picture.standing` for the rules.
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

from serving.errors import ReplicaConflict, StateAway
from serving.probe import Probe
from serving.registry import Registry, ReplicaSource
from serving.replica import STATE_DATABASE, State
from serving.state.database import Pulse
from serving.state.link import Link
from serving.state.picture import MISSES, Followed, Silence, Standing, followed, orphans, standing

log = logging.getLogger(__name__)

POLL_SECONDS = 0.25
LONGEST_PAUSE_SECONDS = 2.0
BEAT_SECONDS = 2.0
SILENT_SECONDS = 5.0
PROBE_SECONDS = 1.0


@dataclass(slots=True)
class Follower:
    """Keeps a registry true to what supervisors tell, while the `async with` block runs."""

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
    _pulse: Pulse | None = None
    _followed: dict[str, Followed] = field(default_factory=dict)
    _source: ReplicaSource = field(init=False)
    _conflicts: set[str] = field(default_factory=set)
    _heard: dict[str, float] = field(default_factory=dict)
    _misses: dict[str, int] = field(default_factory=dict)
    _away: bool = False
    _mute: bool = False
    _acknowledged: tuple[str, int] | None = None
    _told_at: float = float("-inf")
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.id = f"{self.host}-{os.getpid()}-{secrets.token_hex(4)}"
        self._source = self.registry.source(STATE_DATABASE)

    async def __aenter__(self) -> Self:
        """Look once, so that the first request finds what is there; a database that is away stops nobody."""
        await self._look_or_note()
        self._tasks = [
            asyncio.create_task(self._follow(), name="follow the state database"),
            asyncio.create_task(self._ask_in_doubt(), name="ask replicas whose supervisor is silent"),
        ]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop following, and say so, lest a supervisor waits for us."""
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
        """Follow replicas of other variants from the next look on, with other keys."""
        self.variants, self.keys = variants, keys
        self._pulse = None

    async def _follow(self) -> None:
        pause = POLL_SECONDS
        while True:
            await asyncio.sleep(pause)
            reached = await self._look_or_note()
            pause = POLL_SECONDS if reached else min(2 * pause, LONGEST_PAUSE_SECONDS)

    async def _look_or_note(self) -> bool:
        """Look, and then say what we act on; tells whether the database could be read."""
        try:
            await self._look()
        except StateAway as away:
            if not self._away:
                log.warning("%s; replicas stay as they were last seen, and it is asked again", away)
            self._away = True
        self._show()
        if not self._away:
            await self._acknowledge_or_note()
        return not self._away

    async def _look(self) -> None:
        pulse = await self.link.call(self.link.database.pulse)
        if self._news(pulse):
            await self._take_picture()
        else:
            self._hear(pulse)
        if self._away:
            log.info("the state database %s is back", self.link.database.engine.name)
        self._away = False

    def _news(self, pulse: Pulse) -> bool:
        seen = self._pulse
        if seen is None or (seen.epoch, seen.revision) != (pulse.epoch, pulse.revision):
            return True
        return {owner.id for owner in seen.owners} != {owner.id for owner in pulse.owners}

    async def _take_picture(self) -> None:
        picture = await self.link.call(self.link.database.picture)
        anew = self._pulse is not None and self._pulse.epoch != picture.pulse.epoch
        self._hear(picture.pulse)
        told = followed(picture, self.variants, self.keys, self.host)
        owners = {each.owner.id for each in self._followed.values()}
        lost = frozenset(owner for owner in owners if anew or self._silent(owner))
        self._followed = told | orphans(self._followed, told, lost)
        self._heard = {owner.id: self._heard[owner.id] for owner in picture.pulse.owners}

    def _hear(self, pulse: Pulse) -> None:
        """Note who has beaten since we looked last; a database that was away lets nobody look silent."""
        before = {owner.id: owner.beat for owner in self._pulse.owners} if self._pulse else {}
        now = self.clock()
        for owner in pulse.owners:
            if owner.id not in self._heard:
                # How old the beat is we can only guess by its wall clock; wrong, we ask the replica once too often.
                old = self.wall_clock() - owner.beat_at > self.silent_seconds
                self._heard[owner.id] = float("-inf") if old else now
            elif self._away or before.get(owner.id) != owner.beat:
                self._heard[owner.id] = now
        self._pulse = pulse

    def _silent(self, owner_id: str) -> bool:
        return self.clock() - self._heard.get(owner_id, float("-inf")) > self.silent_seconds

    def _silence(self, each: Followed) -> Silence | None:
        if each.orphan:
            return "supervisor"
        if not self._silent(each.owner.id):
            return None
        return "database" if self._away else "supervisor"

    def _show(self) -> None:
        """Bring the registry in line."""
        for name, each in list(self._followed.items()):
            silence = self._silence(each)
            if silence is None:
                self._misses.pop(name, None)
            misses = self._misses.get(name, 0)
            if each.orphan and misses >= MISSES:
                log.warning("replica %s is gone: nobody tells of it, and it doesn't answer", name)
                del self._followed[name], self._misses[name]
                continue
            self._put_or_log(each, standing(each, silence, misses))
        self._source.keep_only(self._followed)
        self._conflicts &= self._followed.keys()

    def _put_or_log(self, tracked: Followed, effective: Standing) -> None:
        """Update a replica's entry in the registry; while another source owns the id, skip it and log that once."""
        replica = tracked.told.replica
        age_seconds = max(0.0, self.wall_clock() - tracked.told.since)
        since = self.clock() - age_seconds if effective.as_told else None
        try:
            self._source.put(replica, effective.state, effective.reason, since)
        except ReplicaConflict as conflict:
            if replica.id not in self._conflicts:
                log.warning("%s", conflict)
            self._conflicts.add(replica.id)
        else:
            self._conflicts.discard(replica.id)

    async def _acknowledge_or_note(self) -> None:
        """Say which revision we act on, when it is another one, and from time to time as a sign of life."""
        assert self._pulse is not None
        acted_on = (self._pulse.epoch, self._pulse.revision)
        now = self.clock()
        if self._acknowledged == acted_on and now - self._told_at < BEAT_SECONDS:
            return
        self._told_at = now  # also if it fails: reading goes on meanwhile
        try:
            await self.link.call(self.link.database.acknowledge, self.id, *acted_on, self.wall_clock())
        except StateAway as away:
            if not self._mute:
                log.warning("%s; it can be read, not written, so supervisors can't know what we know", away)
            self._mute, self._acknowledged = True, None
        else:
            self._mute, self._acknowledged = False, acted_on

    async def _ask_in_doubt(self) -> None:
        """Ask the replicas themselves while those who should tell of them are silent."""
        while True:
            doubtful = [
                each for each in self._followed.values() if each.told.state is State.READY and self._silence(each)
            ]
            replicas = [each.told.replica for each in doubtful]
            answers = await asyncio.gather(*(self.probe.healthy(replica.url, replica.tls) for replica in replicas))
            for replica, healthy in zip(replicas, answers, strict=True):
                self._misses[replica.id] = 0 if healthy else self._misses.get(replica.id, 0) + 1
            if doubtful:
                self._show()
            await asyncio.sleep(self.probe_seconds)
