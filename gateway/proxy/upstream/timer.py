"""The one timer that limits how long a reply may take."""

import asyncio
from collections.abc import Callable
from math import inf

from gateway.routing.target import Timeouts

MAX_TIMER_SECONDS = 3600.0
DEFAULT_TIMEOUTS = Timeouts()


class ReplyTimer:
    """One timer for all replies of a connection; it is checked when it fires, instead of being set around every wait.

    The connection sets `received_at` (on the loop's clock) when data arrives, and `paused` while it does not read on
    purpose. `on_timeout` is called with a description.
    """

    __slots__ = (
        "_heard_at",
        "_loop",
        "_on_timeout",
        "_sent_at",
        "_timeouts",
        "_timer",
        "_until",
        "paused",
        "received_at",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop, on_timeout: Callable[[str], None]) -> None:
        self._loop = loop
        self._on_timeout = on_timeout
        self._timeouts = DEFAULT_TIMEOUTS
        self._timer: asyncio.TimerHandle | None = None
        self._until = 0.0
        self._sent_at = 0.0
        self._heard_at = -inf  # the last data of the reply before
        self.received_at = 0.0  # 0: nothing yet
        self.paused = False

    def start(self, timeouts: Timeouts) -> None:
        """A request is sent now."""
        self._timeouts = timeouts
        self._sent_at = now = self._loop.time()
        if self.received_at:
            self._heard_at = self.received_at
        self.received_at = 0.0
        # The timer of an earlier request nearly always fires before this one can time out, and is set anew then.
        if self._timer is None or self._until > now + timeouts.shortest_seconds:
            self._set()

    @property
    def heard_at(self) -> float:
        """When data of any reply arrived last; -inf if none has."""
        return self.received_at or self._heard_at

    @property
    def silent_seconds(self) -> float:
        """How long the present reply has been silent; 0 while it is not read on purpose."""
        return 0.0 if self.paused else self._loop.time() - (self.received_at or self._sent_at)

    def stop(self) -> None:
        """No reply is expected any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _set(self) -> None:
        # first_byte_seconds may exceed idle_seconds, and the first byte does not reset this timer: wake up after
        # idle_seconds.
        ends_at = min(self._ends_at(), self._loop.time() + self._timeouts.idle_seconds)
        if self._timer is not None:
            if self._until <= ends_at:
                return
            self._timer.cancel()
        self._until = ends_at
        self._timer = self._loop.call_at(ends_at, self._on_timer)

    def _ends_at(self) -> float:
        """When the present wait has lasted too long."""
        timeouts, sent, received = self._timeouts, self._sent_at, self.received_at
        idle_until = received + timeouts.idle_seconds if received else sent + timeouts.first_byte_seconds
        return min(idle_until, sent + timeouts.total_seconds, self._loop.time() + MAX_TIMER_SECONDS)

    def _on_timer(self) -> None:
        self._timer = None
        now, timeouts = self._loop.time(), self._timeouts
        if now >= self._sent_at + timeouts.total_seconds:
            self._on_timeout(f"a replica's reply was not complete after {timeouts.total_seconds:g} s")
        elif self.paused:
            # Reading is paused for a slow client; ClientTimeouts.slow_reader_seconds bounds that.
            self.received_at = now
            self._set()
        elif now < self._ends_at():
            self._set()
        elif self.received_at:
            self._on_timeout(f"a replica sent nothing more for {timeouts.idle_seconds:g} s")
        else:
            self._on_timeout(f"a replica sent nothing for {timeouts.first_byte_seconds:g} s")
