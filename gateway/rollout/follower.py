"""Follows rollouts in the state database, each second, and shares what this process drew and saw.

While the database is away, the last revision stays in force, and evidence is kept until it is back.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Self, cast

from gateway.rollout.arms import AliasArms, Rollouts
from gateway.rollout.collection import BLOCK_SECONDS
from gateway.rollout.lottery import Arm
from serving.defects import logged_defects
from serving.errors import StateAway
from serving.state.link import Link
from serving.state.rollout_records import EMPTY, BlockRecord, DrawRecord, RolloutSnapshot
from serving.state.rollouts import RolloutDatabase

log = logging.getLogger(__name__)

FOLLOW_SECONDS = 1.0
AWAY_SECONDS = 2.0
# Kept while the database is away; older ones are dropped.
MAX_BLOCKS = 360


class RolloutFollower:
    """Calls `apply` with each new snapshot while the `async with` block runs; `worker` names this process."""

    def __init__(
        self,
        link: Link,
        rollouts: Rollouts,
        apply: Callable[[RolloutSnapshot], None],
        worker: str,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.snapshot: RolloutSnapshot = EMPTY
        self.away: str | None = None  # why the database cannot be read
        self._link = link
        self._database = RolloutDatabase(link.database)
        self._rollouts = rollouts
        self._apply = apply
        self._worker = worker
        self._wall_clock = wall_clock
        self._seen: tuple[str, int] | None = None
        self._highest: dict[str, int] = {}
        self._blocks: deque[BlockRecord] = deque(maxlen=MAX_BLOCKS)
        self._block = int(wall_clock() // BLOCK_SECONDS)
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Read the recorded revisions before the first request; an unavailable database is no error."""
        await self.follow()
        self._task = asyncio.create_task(self._follow_regularly(), name="follow rollouts")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop, and write what was not written yet."""
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        if self.away is None and self._rollouts.active:
            self._end_block()
            await self._reached(self._share)
        self._link.close()

    async def follow(self) -> None:
        """Read what has changed, and write what there is to tell."""
        block = int(self._wall_clock() // BLOCK_SECONDS)
        if self._rollouts.active and block != self._block:
            self._end_block()
        self._block = block
        await self._reached(self._exchange)

    async def _follow_regularly(self) -> None:
        while True:
            await asyncio.sleep(FOLLOW_SECONDS if self.away is None else AWAY_SECONDS)
            with logged_defects("following rollouts"):
                await self.follow()

    async def _reached(self, step: Callable[[], Awaitable[None]]) -> None:
        try:
            await step()
        except StateAway as away:
            if self.away is None:
                log.warning("%s; the last revision of each alias stays in force; retrying", away)
            self.away = str(away)
        else:
            if self.away is not None:
                log.info("rollouts are followed again in %s", self._link.database.engine.name)
            self.away = None

    async def _exchange(self) -> None:
        revision = await self._link.call(self._database.revision)
        if revision != self._seen:
            self.snapshot = await self._link.call(self._database.snapshot)
            self._seen = (self.snapshot.epoch, self.snapshot.revision)
            running = {record.id for record in self.snapshot.active}
            self._highest = {name: seq for name, seq in self._highest.items() if name in running}
            self._apply(self.snapshot)
        if self._rollouts.active:
            await self._share()

    async def _share(self) -> None:
        """Write blocks and draws, and learn those of others."""
        for arms in tuple((self._rollouts.active or {}).values()):
            blocks = [block for block in self._blocks if block.rollout == arms.rollout]
            draws = arms.lottery.take_unshared()
            try:
                if blocks or draws:
                    records = [DrawRecord(draw.conversation, draw.arm, draw.step) for draw in draws]
                    await self._link.call(self._database.add_evidence, arms.rollout, blocks, records)
            except StateAway:
                arms.lottery.put_back(draws)
                raise
            for block in blocks:
                self._blocks.remove(block)
            await self._learn(arms)

    async def _learn(self, arms: AliasArms) -> None:
        highest, draws = await self._link.call(self._database.draws, arms.rollout, self._highest.get(arms.rollout, 0))
        self._highest[arms.rollout] = highest
        arms.lottery.learn([(draw.conversation, cast("Arm", draw.arm), draw.step) for draw in draws])

    def _end_block(self) -> None:
        now = self._wall_clock()
        for arms in (self._rollouts.active or {}).values():
            document = arms.collection.take_block()
            if document is not None:
                self._blocks.append(BlockRecord(arms.rollout, self._worker, self._block, now, document.decode()))
