"""Takes a changed configuration in while everything runs: at SIGHUP, or when the file is another one."""

import asyncio
import logging
import signal
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from config.errors import ConfigError
from serving.errors import ServingError

log = logging.getLogger(__name__)

Outcome = Literal["applied", "refused", "failed"]


@dataclass(slots=True)
class Reload:
    """Looks at `files` while the `async with` block runs and calls `apply` when one has changed, one call at a time.

    What `apply` raises is told, and what was in force stays: ConfigError and LaunchRefused before anything was
    touched, another ServingError half-way.
    """

    files: Callable[[], Iterable[Path]]
    apply: Callable[[], Awaitable[None]]
    tell: Callable[[Outcome], None] = lambda _: None
    every_seconds: float = 1.0
    _asked: asyncio.Event = field(default_factory=asyncio.Event)
    _task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Begin to look."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._asked.set)
        self._task = asyncio.create_task(self._follow(self._stamps()), name="reload")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Look no more; a reload that is under way is given up where it is."""
        asyncio.get_running_loop().remove_signal_handler(signal.SIGHUP)
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _follow(self, seen: list[object]) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self.every_seconds):
                    await self._asked.wait()
            now = self._stamps()
            if self._asked.is_set() or now != seen:
                self._asked.clear()
                seen = now
                await self._reload()

    async def _reload(self) -> None:
        try:
            await self.apply()
        except ConfigError as error:
            self._told("refused", f"the configuration is refused, the one before stays in force: {error}")
        except ServingError as error:
            self._told("failed", f"the configuration could not be taken over whole: {error}")
        except Exception as error:  # the outermost loop: a defect in one reload must not be the last
            self._told("failed", f"reloading has a defect: {error!r}")
            log.exception("reloading has a defect")
        else:
            log.info("the configuration is in force")
            self.tell("applied")

    def _told(self, outcome: Outcome, what: str) -> None:
        log.error("%s", what)
        self.tell(outcome)

    def _stamps(self) -> list[object]:
        return [_stamp(path) for path in self.files()]


def _stamp(path: Path) -> object:
    try:
        told = path.stat()
    except OSError:
        return None
    return told.st_ino, told.st_size, told.st_mtime_ns
