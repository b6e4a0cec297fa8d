"""Where conversations are: the variant and the replica that answered the latest turn of each."""

from collections import OrderedDict

import msgspec

MAX_SESSIONS = 10_000


class Placement(msgspec.Struct, frozen=True, gc=False):
    """Where a conversation was answered last.

    `running` counts its turns whose answers have not ended; `idle_since_seconds` is when the last of them did, on the
    monotonic clock, None while one runs.
    """

    variant: str
    replica_id: str
    running: int = 0
    idle_since_seconds: float | None = None

    def idle_seconds(self, now: float) -> float:
        """How long no turn has run; 0 while one does."""
        return 0.0 if self.idle_since_seconds is None else now - self.idle_since_seconds


class Sessions:
    """The latest conversations, at most `limit`; those with a turn in flight are forgotten last."""

    def __init__(self, limit: int = MAX_SESSIONS) -> None:
        self._limit = limit
        # Least recently used first, in both.
        self._idle: OrderedDict[str, Placement] = OrderedDict()
        self._running: OrderedDict[str, Placement] = OrderedDict()

    def __len__(self) -> int:
        return len(self._idle) + len(self._running)

    def placement(self, session: str) -> Placement | None:
        """Return where a conversation was answered last; None if it is new or forgotten."""
        return self._running.get(session) or self._idle.get(session)

    def placements(self) -> dict[str, Placement]:
        """Return all of them by session."""
        return {**self._idle, **self._running}

    def begin(self, session: str, variant: str, replica_id: str) -> Placement | None:
        """Record where a turn goes, until `end`; returns where the turn before it went."""
        before = self._running.pop(session, None) or self._idle.pop(session, None)
        running = 1 if before is None else before.running + 1
        self._running[session] = Placement(variant, replica_id, running)
        if before is None and len(self) > self._limit:
            (self._idle or self._running).popitem(last=False)
        return before

    def end(self, session: str, now: float) -> None:
        """Record that the answer to a turn ended, well or not; a forgotten session is ignored."""
        placement = self._running.pop(session, None)
        if placement is None:
            return
        if placement.running > 1:
            self._running[session] = Placement(placement.variant, placement.replica_id, placement.running - 1)
        else:
            self._idle[session] = Placement(placement.variant, placement.replica_id, 0, now)
