"""A closed loop: a number of slots, each of which sends its next request when its last one has ended."""

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from serving.errors import ProbeFailed
from serving.measuring.figures import Exchange, Window
from serving.measuring.mix import Lengths, unique_prompt
from serving.measuring.streaming import Target, complete

PAUSE_AFTER_FAILURE_SECONDS = 0.2
MAX_FAILURES_IN_A_ROW = 6
WARM_UP_REQUESTS = 3


@dataclass(frozen=True, slots=True)
class Effort:
    """The least time and the least number of requests for which a level is observed."""

    seconds: float
    requests: int


@dataclass(frozen=True, slots=True)
class Observed:
    """The exchanges of a level, and its window; `busy_share` is this process' share of a core."""

    exchanges: tuple[Exchange, ...]
    window: Window
    busy_share: float


@dataclass(slots=True)
class LoadGenerator:
    """Sends requests to one server; `lengths` starts anew for each level, prompts are never repeated."""

    target: Target
    vocabulary: int
    lengths: Callable[[], Iterator[Lengths]]
    _random: random.Random = field(default_factory=random.Random)

    async def warm_up(self) -> None:
        """Send a few requests one after another; ProbeFailed if one fails."""
        lengths = self.lengths()
        for _ in range(WARM_UP_REQUESTS):
            exchange = await self._send(next(lengths), [], lambda: None)
            if exchange.failure:
                raise ProbeFailed(f"{self.target.url}: a request to warm up failed: {exchange.failure}")

    async def observe(self, concurrency: int, effort: Effort, progress: Callable[[int], None]) -> Observed:
        """Keep `concurrency` requests running until the effort is made, or until no request succeeds any more."""
        level = _Level(concurrency, progress)
        lengths = self.lengths()
        tasks = [asyncio.create_task(self._keep_busy(level, lengths, slot)) for slot in range(concurrency)]
        try:
            await level.until(lambda: len(level.started) == concurrency)
            level.opened_seconds, computed = time.monotonic(), time.process_time()
            await level.until(lambda: False, effort.seconds)
            await level.until(lambda: level.done >= effort.requests)
            window = Window(level.opened_seconds, time.monotonic())
            busy_share = (time.process_time() - computed) / window.seconds
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception):
                raise result
        return Observed(tuple(level.exchanges), window, busy_share)

    async def _keep_busy(self, level: "_Level", lengths: Iterator[Lengths], slot: int) -> None:
        """Send one request after another; first answers differ in length, so that slots get out of step."""
        following = next(lengths)
        cut = round(following.answer_tokens * (slot + 1) / level.concurrency)
        following = Lengths(following.prompt_tokens, max(1, cut))
        while True:
            exchange = await self._send(following, level.exchanges, lambda: level.start(slot))
            level.end(slot, exchange)
            if exchange.failure:
                await asyncio.sleep(PAUSE_AFTER_FAILURE_SECONDS)
            following = next(lengths)

    async def _send(self, lengths: Lengths, exchanges: list[Exchange], on_first_token: Callable[[], None]) -> Exchange:
        prompt = unique_prompt(lengths.prompt_tokens, self.vocabulary, self._random)
        exchange = Exchange(time.monotonic(), len(prompt))
        exchanges.append(exchange)
        await complete(self.target, prompt, lengths.answer_tokens, exchange, on_first_token)
        return exchange


@dataclass(slots=True)
class _Level:
    """A level while it runs; `started` are the slots that have had a token or failed, `done` counts in the window."""

    concurrency: int
    progress: Callable[[int], None]
    exchanges: list[Exchange] = field(default_factory=list)
    opened_seconds: float = float("inf")
    started: set[int] = field(default_factory=set)
    done: int = 0
    hopeless: bool = False
    _failed_in_a_row: int = 0
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def until(self, condition: Callable[[], bool], at_most_seconds: float | None = None) -> None:
        """Wait for a condition, until time is up, or until too many requests in a row have failed."""
        with suppress(TimeoutError):
            async with asyncio.timeout(at_most_seconds):
                while not condition() and not self.hopeless:
                    self._changed.clear()
                    await self._changed.wait()

    def start(self, slot: int) -> None:
        """A slot has its first token, or has failed."""
        self.started.add(slot)
        self._changed.set()

    def end(self, slot: int, exchange: Exchange) -> None:
        """A request has ended."""
        if exchange.failure:
            self._failed_in_a_row += 1
            self.hopeless |= self._failed_in_a_row >= max(MAX_FAILURES_IN_A_ROW, 2 * self.concurrency)
        else:
            self._failed_in_a_row = 0
            if exchange.sent_seconds > self.opened_seconds:
                self.done += 1
                self.progress(self.done)
        self.start(slot)
