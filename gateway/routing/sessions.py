"""Where conversations are: the variant and the replica that each had its latest turn from."""

from collections import OrderedDict

import msgspec

MOST_SESSIONS = 10_000


class Placement(msgspec.Struct, frozen=True, gc=False):
    """Where a conversation had its latest turn; `running` counts its turns whose answers haven't ended."""

    variant: str
    replica_id: str
    running: int = 0


class Sessions:
    """The latest conversations, so many at most; one with a turn in flight goes only when all have one."""

    def __init__(self, most: int = MOST_SESSIONS) -> None:
        self._most = most
        # The one that was used least recently comes first, in both.
        self._idle: OrderedDict[str, Placement] = OrderedDict()
        self._running: OrderedDict[str, Placement] = OrderedDict()

    def __len__(self) -> int:
        return len(self._idle) + len(self._running)

    def stay(self, session: str) -> Placement | None:
        """Where it was last; None if it is new, or has been forgotten."""
        return self._running.get(session) or self._idle.get(session)

    def stays(self) -> dict[str, Placement]:
        """Where all of them are."""
        return {**self._idle, **self._running}

    def went(self, session: str, variant: str, replica_id: str) -> bool:
        """Note a choice for a turn, which `ended` ends; tells whether it left the variant that it was on."""
        before = self._running.pop(session, None) or self._idle.pop(session, None)
        running = 1 if before is None else before.running + 1
        self._running[session] = Placement(variant, replica_id, running)
        if before is None and len(self) > self._most:
            self._forget_one()
        return before is not None and before.variant != variant

    def ended(self, session: str) -> None:
        """Note that a turn's answer has ended, well or not; one that has been forgotten is no matter."""
        stay = self._running.pop(session, None)
        if stay is None:
            return
        kept = self._running if stay.running > 1 else self._idle
        kept[session] = Placement(stay.variant, stay.replica_id, stay.running - 1)

    def _forget_one(self) -> None:
        (self._idle or self._running).popitem(last=False)
