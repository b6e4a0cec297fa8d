"""How long a reply may keep us waiting, and the one timer that sees to it."""

import asyncio
import math
from collections.abc import Callable

import msgspec

LONGEST_WATCH_SECONDS = 3600.0


class Timeouts(msgspec.Struct, frozen=True):
    """How long a reply may keep us waiting: for its first byte, for the next one, and as a whole."""

    first_byte_seconds: float = 600.0
    idle_seconds: float = 600.0
    total_seconds: float = math.inf


class ReplyTimer:
    """One timer, looked at when it rings, for all replies of a connection, instead of one around every wait.

    Say when something was heard (`heard_at`, on the loop's clock), and `held` while nothing is read on purpose.
    """

    __slots__ = ("_asked_at", "_deadlines", "_loop", "_time_out", "_timer", "_until", "heard_at", "held")

    def __init__(self, loop: asyncio.AbstractEventLoop, time_out: Callable[[str], None]) -> None:
        self._loop = loop
        self._time_out = time_out
        self._deadlines = Timeouts()
        self._timer: asyncio.TimerHandle | None = None
        self._until = 0.0
        self._asked_at = 0.0
        self.heard_at = 0.0  # 0: nothing yet
        self.held = False

    def begin(self, deadlines: Timeouts) -> None:
        """A request goes out now."""
        self._deadlines, self._asked_at, self.heard_at = deadlines, self._loop.time(), 0.0
        self._set()

    def stop(self) -> None:
        """Nothing is waited for any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _set(self) -> None:
        # The first byte may be waited for much longer than the next one, and nobody says here that it came.
        ends_at = min(self._ends_at(), self._loop.time() + self._deadlines.idle_seconds)
        if self._timer is not None:
            if self._until <= ends_at:
                return
            self._timer.cancel()
        self._until = ends_at
        self._timer = self._loop.call_at(ends_at, self._ring)

    def _ends_at(self) -> float:
        """When the present wait has lasted too long."""
        told, asked, heard = self._deadlines, self._asked_at, self.heard_at
        silent_until = heard + told.idle_seconds if heard else asked + told.first_byte_seconds
        return min(silent_until, asked + told.total_seconds, self._loop.time() + LONGEST_WATCH_SECONDS)

    def _ring(self) -> None:
        self._timer = None
        now, told = self._loop.time(), self._deadlines
        if now >= self._asked_at + told.total_seconds:
            self._time_out(f"an answer was not whole after {told.total_seconds:g} s")
        elif self.held:
            # It is the client that is slow, and others watch it.
            self.heard_at = now
            self._set()
        elif now < self._ends_at():
            self._set()
        elif self.heard_at:
            self._time_out(f"a replica said nothing more for {told.idle_seconds:g} s")
        else:
            self._time_out(f"a replica said nothing for {told.first_byte_seconds:g} s")
