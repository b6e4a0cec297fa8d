"""A state database as the event loop sees it: one call at a time, never on the loop, each with a deadline."""

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from serving.errors import StateAway
from serving.state.database import StateDatabase

T = TypeVar("T")

CALL_SECONDS = 5.0


@dataclass(slots=True)
class Link:
    """Asks a state database from an event loop.

    A call that misses its deadline is left to itself (nothing can end a thread); the next one waits for it to end,
    so that writes keep their order. Threads are daemons: a server that never answers must not hold up our exit.
    """

    database: StateDatabase
    call_seconds: float = CALL_SECONDS
    _closed: threading.Event = field(default_factory=threading.Event)
    _running: "asyncio.Future[Any] | None" = None

    async def call(self, function: Callable[..., T], *arguments: object) -> T:
        """Run a method of the database; StateAway also if there is no answer in time."""
        try:
            async with asyncio.timeout(self.call_seconds):
                while self._running is not None and not self._running.done():
                    await asyncio.wait({self._running})
                running = self._running = _in_a_thread(self._call_and_clean_up, function, *arguments)
                return await asyncio.shield(running)
        except TimeoutError:
            name = self.database.engine.name
            raise StateAway(f"state database {name} is away: no answer within {self.call_seconds:g} s") from None

    def close(self) -> None:
        """Give back the connections; one that a call still uses, when that ends."""
        self._closed.set()
        if self._running is None or self._running.done():
            self.database.close()

    def _call_and_clean_up(self, function: Callable[..., T], *arguments: object) -> T:
        try:
            return function(*arguments)
        finally:
            if self._closed.is_set():
                self.database.close()


def _in_a_thread(function: Callable[..., T], *arguments: object) -> "asyncio.Future[T]":
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[T] = loop.create_future()
    # Nobody may be left to hear what an abandoned call says.
    answer.add_done_callback(lambda done: done.cancelled() or done.exception())

    def settle(value: T | None, problem: BaseException | None) -> None:
        if answer.cancelled():
            return
        if problem is not None:
            answer.set_exception(problem)
        else:
            answer.set_result(cast("T", value))

    def work() -> None:
        value, problem = None, None
        try:
            value = function(*arguments)
        except BaseException as error:  # noqa: BLE001 - whoever waits for the answer gets it, whatever it is
            problem = error
        with suppress(RuntimeError):  # the loop has ended, and with it everybody who waited
            loop.call_soon_threadsafe(settle, value, problem)

    threading.Thread(target=work, name="state database", daemon=True).start()
    return answer
