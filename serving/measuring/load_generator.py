"""A closed loop: so many places, each of which sends its next request when its last one has ended."""

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from serving.errors import ProbeFailed
from serving.measuring.figures import Exchange, Window
from serving.measuring.mix import Lengths, unique_prompt
from serving.measuring.streaming import Ongoing, Target, complete

PAUSE_AFTER_FAILURE_SECONDS = 0.2
HOPELESS_FAILURES = 6
WARM_UP_REQUESTS = 3


@dataclass(frozen=True, slots=True)
class Effort:
    """How long a level is observed: at least so many seconds, and at least so many requests."""

    seconds: float
    requests: int


@dataclass(frozen=True, slots=True)
class Observed:
    """What was seen of a level; `busy_share` of the time this process itself computed."""

    exchanges: tuple[Exchange, ...]
    window: Window
    busy_share: float


@dataclass(slots=True)
class LoadGenerator:
    """Sends requests to one server; `lengths` begins anew for each level, prompts are never sent twice."""

    target: Target
    vocabulary: int
    lengths: Callable[[], Iterator[Lengths]]
    _chance: random.Random = field(default_factory=random.Random)

    async def warm_up(self) -> None:
        """Send the first few requests one after another; ProbeFailed if one doesn't succeed."""
        lengths = self.lengths()
        for _ in range(WARM_UP_REQUESTS):
            ongoing = await self._send(next(lengths), [], lambda: None)
            if ongoing.failure:
                raise ProbeFailed(f"{self.target.url}: a request to warm up failed: {ongoing.failure}")

    async def observe(self, concurrency: int, effort: Effort, progress: Callable[[int], None]) -> Observed:
        """Keep `concurrency` requests running until the effort is made, or until nothing succeeds any more."""
        level = _Level(concurrency, effort.requests, progress)
        lengths = self.lengths()
        slots = [asyncio.create_task(self._keep_busy(level, lengths, place)) for place in range(concurrency)]
        try:
            await _first(level.crowded, level.hopeless)
            level.opened_seconds, computed = time.monotonic(), time.process_time()
            await _first(level.hopeless, at_most_seconds=effort.seconds)
            await _first(level.enough, level.hopeless)
            window = Window(level.opened_seconds, time.monotonic())
            busy_share = (time.process_time() - computed) / window.seconds
        finally:
            for slot in slots:
                slot.cancel()
            ends = await asyncio.gather(*slots, return_exceptions=True)
        for end in ends:
            if isinstance(end, Exception):
                raise end
        return Observed(tuple(each.exchange() for each in level.ongoing), window, busy_share)

    async def _keep_busy(self, level: "_Level", lengths: Iterator[Lengths], place: int) -> None:
        """Send one request after another; the first answers have different lengths, so that places get out of step."""
        following = next(lengths)
        cut = round(following.answer_tokens * (place + 1) / level.concurrency)
        following = Lengths(following.prompt_tokens, max(1, cut))
        while True:
            ongoing = await self._send(following, level.ongoing, lambda: level.take(place))
            level.end(place, ongoing)
            if ongoing.failure:
                await asyncio.sleep(PAUSE_AFTER_FAILURE_SECONDS)
            following = next(lengths)

    async def _send(self, lengths: Lengths, noted: list[Ongoing], on_first_token: Callable[[], None]) -> Ongoing:
        prompt = unique_prompt(lengths.prompt_tokens, self.vocabulary, self._chance)
        ongoing = Ongoing(time.monotonic(), len(prompt))
        noted.append(ongoing)
        await complete(self.target, prompt, lengths.answer_tokens, ongoing, on_first_token)
        return ongoing


@dataclass(slots=True)
class _Level:
    """One level while it runs: who has had a token, how much is done, whether it makes sense to go on."""

    concurrency: int
    wanted: int
    progress: Callable[[int], None]
    ongoing: list[Ongoing] = field(default_factory=list)
    opened_seconds: float | None = None
    crowded: asyncio.Event = field(default_factory=asyncio.Event)
    enough: asyncio.Event = field(default_factory=asyncio.Event)
    hopeless: asyncio.Event = field(default_factory=asyncio.Event)
    _taken: set[int] = field(default_factory=set)
    _done: int = 0
    _failed_in_a_row: int = 0

    def take(self, place: int) -> None:
        """A place has its first token, or has failed."""
        self._taken.add(place)
        if len(self._taken) == self.concurrency:
            self.crowded.set()

    def end(self, place: int, ongoing: Ongoing) -> None:
        """A request has ended."""
        if ongoing.failure:
            self.take(place)
            self._failed_in_a_row += 1
            if self._failed_in_a_row >= max(HOPELESS_FAILURES, 2 * self.concurrency):
                self.hopeless.set()
            return
        self._failed_in_a_row = 0
        if self.opened_seconds is not None and ongoing.sent_seconds > self.opened_seconds:
            self._done += 1
            self.progress(self._done)
            if self._done >= self.wanted:
                self.enough.set()


async def _first(*events: asyncio.Event, at_most_seconds: float | None = None) -> None:
    """Wait until one of several things has happened, or until time is up."""
    waits = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, timeout=at_most_seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
