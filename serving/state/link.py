"""Asynchronous access to the state database: one call at a time, in a thread, with a deadline."""

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
    """Calls a state database from an event loop.

    A call that misses its deadline goes on in its thread; the next one waits for it, so that writes keep their order.
    Threads are daemons: a database server that does not answer must not block the exit of the process.
    """

    database: StateDatabase
    call_seconds: float = CALL_SECONDS
    _closed: threading.Event = field(default_factory=threading.Event)
    _running: "asyncio.Future[Any] | None" = None

    async def call(self, function: Callable[..., T], *arguments: object) -> T:
        """Run a method of the database; StateAway also after `call_seconds` without a result."""
        try:
            async with asyncio.timeout(self.call_seconds):
                while self._running is not None and not self._running.done():
                    await asyncio.wait({self._running})
                running = self._running = self._started(function, *arguments)
                return await asyncio.shield(running)
        except TimeoutError:
            name = self.database.engine.name
            raise StateAway(f"state database {name} is unavailable: no answer within {self.call_seconds:g} s") from None

    def close(self) -> None:
        """Close the connections; if a call still runs, when it ends."""
        self._closed.set()
        if self._running is None or self._running.done():
            self.database.close()

    def _started(self, function: Callable[..., T], *arguments: object) -> "asyncio.Future[T]":
        try:
            return _in_a_thread(self._call_and_clean_up, function, *arguments)
        except RuntimeError as error:  # such as at a limit of processes
            name = self.database.engine.name
            raise StateAway(f"state database {name} is not asked: {error}") from error

    def _call_and_clean_up(self, function: Callable[..., T], *arguments: object) -> T:
        try:
            return function(*arguments)
        finally:
            if self._closed.is_set():
                self.database.close()


def _in_a_thread(function: Callable[..., T], *arguments: object) -> "asyncio.Future[T]":
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[T] = loop.create_future()
    # Retrieve the exception of a call that nothing awaits any more.
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
        except BaseException as error:  # noqa: BLE001 - the awaiting task raises it
            problem = error
        with suppress(RuntimeError):  # the loop is closed, and nothing awaits the result
            loop.call_soon_threadsafe(settle, value, problem)

    threading.Thread(target=work, name="state database", daemon=True).start()
    return answer
