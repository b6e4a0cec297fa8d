"""How late the event loop runs what is due: the first sign of a gateway that does too much, or blocks."""

import asyncio
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from gateway.observability.metrics.instruments import Histogram


@dataclass(slots=True, eq=False)
class LoopLag:
    """Asks to be woken again and again while the `async with` block runs, and observes how much too late that was."""

    lag_seconds: Histogram
    every_seconds: float = 0.25
    _task: asyncio.Task[None] | None = field(default=None, init=False)

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._watch(), name="loop lag")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _watch(self) -> None:
        while True:
            # Not the loop's own clock: uvloop's stands still while it runs callbacks.
            due = time.monotonic() + self.every_seconds
            await asyncio.sleep(self.every_seconds)
            self.lag_seconds.observe(max(0.0, time.monotonic() - due))
