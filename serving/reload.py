"""Takes a changed configuration in while everything runs: at SIGHUP, or when the file is another one.

A configuration that would leave nothing of what answers now is refused (ReloadRefused), however it comes: files get
truncated. A second SIGHUP within `CONFIRM_SECONDS` applies it.
"""

import asyncio
import logging
import signal
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import msgspec

from config.errors import ConfigError, ReloadRefused
from serving.errors import ServingError

log = logging.getLogger(__name__)

Outcome = Literal["applied", "refused", "failed"]

CONFIRM_SECONDS = 10.0

# What differs when a file has changed, by its path; None: there is no such file.
Stamps = Mapping[Path, object]


class ReloadResult(msgspec.Struct, frozen=True):
    """How many SIGHUPs have been handled, and how the last reload ended: its outcome and its error."""

    handled: int = 0
    outcome: Outcome | Literal["none"] = "none"
    message: str = ""
    confirmable: bool = False  # another SIGHUP applies it


@dataclass(slots=True)
class Reload:
    """Looks at `files` while the `async with` block runs and calls `apply` when one has changed, one call at a time.

    An error of `apply` is logged, passed to `report` and stored in `last`, and the previous configuration stays:
    ConfigError and LaunchRefused before any change, another ServingError after some. `apply` gets True if the operator
    has confirmed what was refused before.
    """

    files: Callable[[], Iterable[Path]]
    apply: Callable[[bool], Awaitable[None]]
    report: Callable[[Outcome], None] = lambda _: None
    every_seconds: float = 1.0
    clock: Callable[[], float] = time.monotonic
    _refused: tuple[Stamps, float] | None = None  # at a SIGHUP: the state of the files, and when
    last: ReloadResult = field(default_factory=ReloadResult)
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
        # Without a handler, a SIGHUP would end the process in the middle of draining.
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, _ignore)
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _follow(self, seen: Stamps) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self.every_seconds):
                    await self._asked.wait()
            now = self._stamps()
            by_signal = self._asked.is_set()
            if by_signal or any(seen.get(path) != stamp for path, stamp in now.items()):
                self._asked.clear()
                seen = now
                await self._reload(now, by_signal=by_signal)

    async def _reload(self, stamps: Stamps, *, by_signal: bool) -> None:
        confirmed = by_signal and self._confirms(stamps)
        self._refused = None
        outcome, message = await self._outcome(confirmed, by_signal=by_signal)
        if refused := outcome == "unconfirmed":
            outcome, self._refused = "refused", (stamps, self.clock()) if by_signal else None
        if message:
            log.error("%s", message)
        else:
            log.info("the configuration is in force")
        self.last = ReloadResult(self.last.handled + by_signal, outcome, message, refused)
        self.report(outcome)

    async def _outcome(self, confirmed: bool, *, by_signal: bool) -> tuple[Outcome | Literal["unconfirmed"], str]:
        """Apply the configuration; returns the outcome and the error, which is empty if it was applied."""
        before = "the configuration is refused, the one before stays in force"
        try:
            await self.apply(confirmed)
        except ReloadRefused as error:
            again = "another SIGHUP" if by_signal else "two SIGHUPs"
            how = f"restore the file, or apply it with {again} within {CONFIRM_SECONDS:g} s (quantgate reload --force)"
            return "unconfirmed", f"{before}: {error}; {how}"
        except ConfigError as error:
            return "refused", f"{before}: {error}"
        except ServingError as error:
            return "failed", f"the configuration could not be applied completely: {error}"
        except Exception as error:  # the outermost loop: a defect in one reload must not be the last
            log.exception("reloading has a defect")
            return "failed", f"reloading has a defect: {error!r}"
        return "applied", ""

    def _confirms(self, stamps: Stamps) -> bool:
        """Whether a SIGHUP asks again for what was refused at the one before: the same files, within the time."""
        if self._refused is None:
            return False
        refused, at_seconds = self._refused
        return refused == stamps and self.clock() - at_seconds <= CONFIRM_SECONDS

    def _stamps(self) -> Stamps:
        return {path: stamp_of(path) for path in self.files()}


def stamp_of(path: Path) -> object:
    """Return what differs when a file was changed or replaced; None if it cannot be read."""
    # Links are followed: a ConfigMap of Kubernetes changes by a link to another directory (`..data`).
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _ignore() -> None:
    """Do nothing: a reload makes no difference to a process that stops."""
