"""Follows the keys file: a change is in force within a second, whatever a reload of the configuration waits for."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from config.errors import ConfigError
from serving.defects import logged_defects
from serving.reload import stamp_of

log = logging.getLogger(__name__)


@dataclass(slots=True)
class KeyFileFollower:
    """Calls `apply` when the keys file is another one while the `async with` block runs.

    `path` may change, and is None while there is no keys file. A ConfigError of `apply` is logged. It is called once at
    the beginning: the file may have changed since it was read.
    """

    path: Callable[[], Path | None]
    apply: Callable[[], None]
    every_seconds: float = 1.0
    _seen: object = None
    _task: asyncio.Task[None] | None = field(default=None, init=False)

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._follow_regularly(), name="follow the keys file")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _follow_regularly(self) -> None:
        while True:
            with logged_defects("following the keys file"):
                self._follow()
            await asyncio.sleep(self.every_seconds)

    def _follow(self) -> None:
        path = self.path()
        now = path and (path, stamp_of(path))
        if now == self._seen:
            return
        self._seen = now
        try:
            if path is not None:
                self.apply()
        except ConfigError as error:
            log.error("the API keys in force stay: %s", error)  # noqa: TRY400 - the message says it
