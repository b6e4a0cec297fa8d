"""The engine's part of the fake: admission, the speed of generation, and its faults."""

import asyncio
import contextlib
import http
import json
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from tests.fakes.asks import ApiError, Ask
from tests.fakes.options import Options


class HangUpError(Exception):
    """The connection is to be closed here, without another byte."""


class Journal:
    """The request log: one JSON line per request and per end of a generation."""

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def write(self, record: dict[str, Any]) -> None:
        """Append a line; it is in the file when this returns."""
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(record) + "\n")


class Generation:
    """One admitted request; `steps` is its life in the engine."""

    def __init__(self, engine: "Engine", ask: Ask, *, doomed: bool) -> None:
        self._engine = engine
        self._ask = ask
        self._doomed = doomed
        self.running = False
        self.tokens = 0

    async def steps(self) -> AsyncIterator[int]:
        """Wait for a slot, then yield the number of each step when its tokens are there."""
        engine = self._engine
        await engine.enter(self)
        engine.prompt_tokens += self._ask.prompt_tokens
        begin = asyncio.get_running_loop().time()
        for step in range(self._ask.steps):
            await self._reach(step, begin)
            self.tokens += len(self._ask.choices)
            engine.generation_tokens += len(self._ask.choices)
            yield step
        # Before the last bytes are sent: who has read the whole answer finds it counted and logged.
        engine.leave(self, self._ask.finish_reason)

    async def _reach(self, step: int, begin: float) -> None:
        faults = self._engine.faults
        if step == faults.drop_after_tokens:
            raise HangUpError
        if step == faults.stall_after_tokens:
            await self._engine.stall()
        if self._doomed and step == self._ask.steps // 2:
            self._engine.die()
        due = begin + (step + 1) / faults.tokens_per_second if faults.tokens_per_second else None
        if step == 0 and faults.first_token_seconds:
            due = begin + faults.first_token_seconds
        await self._engine.wait_until(due)


class Engine:
    """Owns every generation; the counts that `/metrics` and `/load` show."""

    def __init__(self, options: Options, journal: Journal) -> None:
        self.faults = options.faults
        self.draining = options.faults.draining
        self.dead = asyncio.Event()
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.rejected = 0
        self.succeeded: Counter[str] = Counter()
        self._resumed = asyncio.Event()
        self._unfinished: set[Generation] = set()
        self._admitted = 0
        self._failures_left = options.faults.fail_first
        self._places = asyncio.Semaphore(options.max_num_seqs)
        self._journal = journal

    @property
    def running(self) -> int:
        """The number of requests that generate."""
        return sum(generation.running for generation in self._unfinished)

    @property
    def waiting(self) -> int:
        """The number of admitted requests that wait for a slot."""
        return len(self._unfinished) - self.running

    @contextlib.contextmanager
    def admit(self, ask: Ask) -> Iterator[Generation]:
        """Admit a request or refuse it; a generation that ends before its last step counts as aborted."""
        self._refuse()
        generation = Generation(self, ask, doomed=self._admitted == self.faults.crash_after_requests)
        self._admitted += 1
        self._unfinished.add(generation)
        try:
            yield generation
        finally:
            self.leave(generation, "abort")

    async def enter(self, generation: Generation) -> None:
        """Wait for one of the `--max-num-seqs` slots."""
        await self._places.acquire()
        generation.running = True

    def leave(self, generation: Generation, reason: str) -> None:
        """Release the slot and log how the generation ended; only the first call counts."""
        if generation not in self._unfinished:
            return
        self._unfinished.discard(generation)
        if generation.running:
            self._places.release()
        if reason != "abort":  # vLLM does not count requests that clients leave
            self.succeeded[reason] += 1
        self._journal.write({"event": "aborted" if reason == "abort" else "finished", "tokens": generation.tokens})

    def die(self) -> None:
        """End the engine core: all of its generations get the error now."""
        waiting = self.waiting
        self.dead.set()
        self.resume()
        for _ in range(waiting):
            self._places.release()

    def resume(self) -> None:
        """Resume all stalled generations; from now on none stalls."""
        self._resumed.set()

    async def stall(self) -> None:
        """Go on when resumed, or never."""
        await self._resumed.wait()
        if self.dead.is_set():
            raise engine_dead()

    async def wait_until(self, due: float | None) -> None:
        """Sleep until the loop's clock reaches `due`; without one, yield to other tasks once."""
        if due is None:
            await asyncio.sleep(0)
        else:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(due):
                    await self.dead.wait()
        if self.dead.is_set():
            raise engine_dead()

    def _refuse(self) -> None:
        if self.dead.is_set():
            raise engine_dead()
        if self.draining:
            raise ApiError(500, "InternalServerError", "cannot schedule new futures after shutdown")
        if self._failures_left > 0:
            self._failures_left -= 1
            raise _failure(self.faults.fail_status)
        limit = self.faults.queue_limit
        if limit is not None and len(self._unfinished) >= limit:
            self.rejected += 1
            raise _failure(503)


def engine_dead() -> ApiError:
    """The error of every generation that the engine's end interrupts."""
    message = "EngineCore encountered an issue. See stack trace (above) for the root cause."
    return ApiError(500, "InternalServerError", message)


def _failure(status: int) -> Exception:
    if status == 0:
        return HangUpError()
    if status == 500:
        return ApiError(500, "InternalServerError", "Internal server error")
    message = (
        "The engine is currently busy and cannot accept new requests. "
        "Please try again later or on a different instance."
    )
    return ApiError(status, http.HTTPStatus(status).phrase, message)
