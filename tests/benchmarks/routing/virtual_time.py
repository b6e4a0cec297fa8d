"""An event loop whose clock jumps to whatever happens next: asyncio code runs as it is, and nothing ever waits."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Stuck(Exception):
    """Everybody waits, and nothing is going to happen."""


class _Jump:
    """Stands where a loop waits for sockets."""

    def __init__(self) -> None:
        self.now = 0.0

    def select(self, timeout: float | None) -> list[Any]:
        if timeout is None:
            raise Stuck("every task waits, and no timer is set")
        self.now += max(timeout, 0.0)
        return []


class VirtualLoop(asyncio.BaseEventLoop):
    """Time begins at 0 seconds; there are no sockets, no threads and no signals."""

    def __init__(self) -> None:
        super().__init__()
        self.failure: BaseException | None = None
        # What asyncio.BaseEventLoop's _run_once asks for events, and hands them to.
        self._selector = _Jump()

    def time(self) -> float:
        """Seconds since the loop was made."""
        return self._selector.now

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Stop at the first mistake that nobody waits for."""
        if self.failure is None:
            self.failure = context.get("exception") or RuntimeError(context["message"])
            self.stop()

    def _process_events(self, event_list: list[Any]) -> None:
        pass


def run_in_virtual_time(loop: VirtualLoop, main: Coroutine[Any, Any, T]) -> T:
    """Run to the end, or to the first mistake; what is still running then is cancelled."""
    try:
        task = loop.create_task(main)
        task.add_done_callback(lambda _: loop.stop())
        loop.run_forever()
        left = asyncio.all_tasks(loop)
        for each in left:
            each.cancel()
        if left:
            loop.run_until_complete(asyncio.wait(left))
        if loop.failure is not None:
            raise loop.failure
        return task.result()
    finally:
        loop.close()
