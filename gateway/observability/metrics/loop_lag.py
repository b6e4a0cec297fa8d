"""Event loop lag: the first sign of an overloaded gateway, or of blocking code on the event loop."""

import asyncio
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from gateway.observability.metrics.instruments import Histogram


@dataclass(slots=True, eq=False)
class LoopLag:
    """Sleeps periodically while the `async with` block runs, and observes how much later than due it woke up."""

    lag_seconds: Histogram
    interval_seconds: float = 0.25
    _task: asyncio.Task[None] | None = field(default=None, init=False)

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._measure(), name="loop lag")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _measure(self) -> None:
        while True:
            # Not loop.time(): uvloop caches it and does not advance it while callbacks run.
            due = time.monotonic() + self.interval_seconds
            await asyncio.sleep(self.interval_seconds)
            self.lag_seconds.observe(max(0.0, time.monotonic() - due))
