"""Polls replicas that other programs run, configured by `url` or found: ready while healthy, failed otherwise.

A quality floor holds only if the address serves the variant it should. If the variant's directory is available, its
golden prompt is sent before the replica becomes ready.
"""

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Self

from config.golden import GoldenAnswer
from serving.defects import logged_defects
from serving.errors import ProbeFailed, ReplicaConflict
from serving.golden import compare
from serving.probe import Probe
from serving.registry import Registry, ReplicaSource
from serving.replica import CONFIGURATION, Replica, State
from serving.thinking import detect_thinking

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Poll:
    """A replica as configured, and the task that polls it."""

    replica: Replica
    task: asyncio.Task[None]


@dataclass(slots=True)
class Watch:
    """Polls external replicas while the `async with` block runs, and updates their entries in the registry.

    `replicas` are those at the start. `goldens` are the expected answers by variant. `owner` is the source of the
    entries.
    """

    replicas: tuple[Replica, ...]
    registry: Registry
    probe: Probe
    goldens: Mapping[str, GoldenAnswer] = field(default_factory=dict)
    every_seconds: float = 1.0
    owner: str = CONFIGURATION
    _source: ReplicaSource = field(init=False)
    _rejected: set[str] = field(default_factory=set)
    _polls: dict[str, _Poll] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._source = self.registry.source(self.owner)

    async def __aenter__(self) -> Self:
        """Start polling every replica; none is ready before it has answered. Raises ReplicaConflict."""
        try:
            self.add(self.replicas)
        except ReplicaConflict:
            await self._stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop polling."""
        await self._stop()

    def add(self, replicas: tuple[Replica, ...]) -> None:
        """Start polling the replicas that are new or have changed.

        Raises ReplicaConflict if another source owns an id; the replicas after it in the tuple are not added.
        """
        for replica in replicas:
            poll = self._polls.get(replica.id)
            if poll is not None and poll.replica == replica:
                continue
            self._source.put(replica, State.STARTING, "not reached yet")
            self._rejected.discard(replica.id)
            if poll is not None:
                poll.task.cancel()
            task = asyncio.create_task(self._poll_regularly(replica), name=f"watch {replica.id}")
            self._polls[replica.id] = _Poll(replica, task)

    def hold(self, replica: Replica, state: State, reason: str) -> None:
        """Stop polling a replica; its entry stays, in this state. ReplicaConflict if another source owns its id."""
        poll = self._polls.pop(replica.id, None)
        if poll is not None:
            poll.task.cancel()
        if poll is not None and poll.replica == replica:
            self._source.move(replica.id, state, reason)  # keeps what the last check has seen of it
        else:
            self._source.put(replica, state, reason)

    def remove(self, replica_id: str) -> None:
        """Stop polling a replica, and remove it from the registry."""
        poll = self._polls.pop(replica_id, None)
        if poll is not None:
            poll.task.cancel()
        self._source.remove(replica_id)

    def keep_only(self, replicas: tuple[Replica, ...]) -> None:
        """Stop polling all others and remove them from the registry; replicas of other sources stay."""
        wanted = {replica.id for replica in replicas}
        for replica_id in self._polls.keys() - wanted:
            self._polls.pop(replica_id).task.cancel()
        self._source.keep_only(wanted)

    async def _stop(self) -> None:
        tasks = [poll.task for poll in self._polls.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _poll_regularly(self, replica: Replica) -> None:
        while True:
            with logged_defects(f"watching replica {replica.id}"):
                await self._poll(replica)
            await asyncio.sleep(self.every_seconds)

    async def _poll(self, replica: Replica) -> None:
        state = self.registry.status(replica.id).state
        if not await self.probe.healthy(replica.url, replica.tls):
            if state is not State.FAILED:
                log.warning("replica %s at %s is not healthy", replica.id, replica.url)
            self._source.move(replica.id, State.FAILED, f"{replica.url} is not healthy")
            self._rejected.discard(replica.id)
        elif state is not State.READY and replica.id not in self._rejected:
            await self._verify(replica)

    async def _verify(self, replica: Replica) -> None:
        """Read the served model's name, which may have changed, and check the golden prompt; then it is ready."""
        try:
            served = await self.probe.served_model(replica)
        except ProbeFailed as error:
            self._source.move(replica.id, State.FAILED, str(error))
            return
        seen = replace(
            replica,
            served_name=served.name,
            max_model_len_tokens=served.max_model_len_tokens,
            adapters=tuple([adapter for adapter in replica.adapters if adapter in served.adapters]),
        )
        if missing := [adapter for adapter in replica.adapters if adapter not in seen.adapters]:
            log.warning("replica %s at %s does not serve its adapters %s", replica.id, replica.url, ", ".join(missing))
        if reason := await self._golden_mismatch(seen):
            # Not checked again until it was unhealthy: only a restart can change the model.
            self._rejected.add(replica.id)
            log.error("replica %s at %s is not %s: %s", replica.id, replica.url, replica.variant, reason)
            self._source.move(replica.id, State.FAILED, f"is not {replica.variant}: golden prompt {reason}")
            return
        if seen.tools is None:
            seen = replace(seen, tools=await self.probe.takes_tools(seen))
        self._source.put(await detect_thinking(self.probe, seen), State.READY)
        log.info("replica %s at %s is ready", replica.id, replica.url)

    async def _golden_mismatch(self, replica: Replica) -> str | None:
        """Return how the golden answer differs; None if it matches, is not recorded, or is not supported."""
        golden = self.goldens.get(replica.variant)
        if golden is None:
            return None
        try:
            golden = golden.shortened(replica.max_model_len_tokens)
            result = compare(await self.probe.prompt_logprobs(replica, golden.ids), golden)
        except ProbeFailed as error:
            log.info("replica %s does not support the golden prompt check: %s", replica.id, error)
            return None
        if result.verdict == "indistinguishable":
            log.info("replica %s: golden prompt: %s", replica.id, result.reason)
        return result.reason if result.verdict == "different" else None
