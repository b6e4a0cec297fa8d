"""Requests side by side: within bounds on their number and on the tokens of their prompts."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any


class PromptWindow:
    """Admits requests while they are few and their prompts short together; a long prompt waits until it is alone."""

    def __init__(self, requests: int, tokens: int) -> None:
        self._requests, self._tokens = requests, tokens
        self._running: list[int] = []
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def holding(self, tokens: int) -> AsyncIterator[None]:
        """Wait for room for a prompt of so many tokens, and take it."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._has_room(tokens))
            self._running.append(tokens)
        try:
            yield
        finally:
            async with self._changed:
                self._running.remove(tokens)
                self._changed.notify_all()

    def _has_room(self, tokens: int) -> bool:
        fits = len(self._running) < self._requests and sum(self._running) + tokens <= self._tokens
        return fits or not self._running


async def gather_all(work: Sequence[Any]) -> list[Any]:
    """Await coroutines side by side and return their results; the first error ends all and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return [task.result() for task in tasks]
