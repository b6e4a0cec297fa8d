"""Follows the replicas that somebody else runs: ready while they are healthy, failed while they aren't.

A floor is worth what stands behind the address: where the variant's directory is at hand, its golden prompt is asked.
"""

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Self

from config.golden import GoldenAnswer
from serving.errors import ProbeFailed
from serving.golden import mismatch
from serving.probe import Probe
from serving.registry import Registry
from serving.replica import Replica, State
from serving.thinking import thinking_seen

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Watch:
    """Polls foreign replicas while the `async with` block runs; keeps their entries in the registry true."""

    replicas: tuple[Replica, ...]
    registry: Registry
    probe: Probe
    goldens: Mapping[str, GoldenAnswer] = field(default_factory=dict)
    every_seconds: float = 1.0
    _refused: set[str] = field(default_factory=set)
    _tasks: dict[str, asyncio.Task[None]] = field(default_factory=dict)

    async def __aenter__(self) -> Self:
        """Begin to poll every replica; none is ready before it has answered."""
        self.add(self.replicas)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop polling."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def add(self, replicas: tuple[Replica, ...]) -> None:
        """Begin to poll those that are new, or at another address."""
        known = {replica.id: replica for replica in self.replicas if replica.id in self._tasks}
        for replica in replicas:
            if known.get(replica.id) == replica:
                continue
            if old := self._tasks.pop(replica.id, None):
                old.cancel()
            self.registry.put(replica, State.STARTING, "not reached yet")
            self._tasks[replica.id] = asyncio.create_task(self._follow(replica), name=f"watch {replica.id}")
        kept = tuple(each for each in self.replicas if each.id not in {replica.id for replica in replicas})
        self.replicas = kept + replicas

    def keep_only(self, replicas: tuple[Replica, ...]) -> None:
        """Forget all others."""
        wanted = {replica.id for replica in replicas}
        for replica in self.replicas:
            if replica.id not in wanted:
                self._tasks.pop(replica.id).cancel()
                self.registry.remove(replica.id)
        self.replicas = replicas

    async def _follow(self, replica: Replica) -> None:
        while True:
            await self._look(replica)
            await asyncio.sleep(self.every_seconds)

    async def _look(self, replica: Replica) -> None:
        state = self.registry.status(replica.id).state
        if not await self.probe.healthy(replica.url, replica.tls):
            if state is not State.FAILED:
                log.warning("replica %s at %s is not healthy", replica.id, replica.url)
            self.registry.move(replica.id, State.FAILED, f"{replica.url} is not healthy")
            self._refused.discard(replica.id)
        elif state is not State.READY and replica.id not in self._refused:
            await self._admit(replica)

    async def _admit(self, replica: Replica) -> None:
        """Learn the name that it answers to; it may have come back as something else."""
        try:
            served = await self.probe.served_model(replica)
        except ProbeFailed as error:
            self.registry.move(replica.id, State.FAILED, str(error))
            return
        seen = replace(replica, served_name=served.name, max_model_len_tokens=served.max_model_len_tokens)
        if wrong := await self._wrong(seen):
            # Until it has been away: it won't be another one before.
            self._refused.add(replica.id)
            log.error("replica %s at %s is not %s: %s", replica.id, replica.url, replica.variant, wrong)
            self.registry.move(replica.id, State.FAILED, f"is not {replica.variant}: golden prompt {wrong}")
            return
        self.registry.put(await thinking_seen(self.probe, seen), State.READY)
        log.info("replica %s at %s is ready", replica.id, replica.url)

    async def _wrong(self, replica: Replica) -> str | None:
        """Say why this can't be its variant; None too where there is no record, or an engine that can't be asked."""
        golden = self.goldens.get(replica.variant)
        if golden is None:
            return None
        try:
            return mismatch(await self.probe.prompt_logprobs(replica, golden.ids), golden)
        except ProbeFailed as error:
            log.info("replica %s can't be asked the golden prompt: %s", replica.id, error)
            return None
