"""Who waits for a replica, and whose turn it is: fair between keys, first come, first served within a key.

Each structure has one owner, which also wakes, refuses and times out: nothing here does. Deadlines are on the
monotonic clock. A ticket is anything hashable that stands for one waiting request.
"""

from collections import OrderedDict
from collections.abc import Hashable
from heapq import heapify, heappop, heappush
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class Deadlines(Generic[T]):
    """Tickets by the time at which they give up."""

    def __init__(self) -> None:
        # A ticket's number tells its entry in the heap from one that it left there earlier.
        self._numbers: dict[T, int] = {}
        self._heap: list[tuple[float, int, T]] = []
        self._next_number = 0

    def add(self, ticket: T, deadline_seconds: float) -> None:
        """Watch a ticket."""
        number = self._next_number = self._next_number + 1
        self._numbers[ticket] = number
        heappush(self._heap, (deadline_seconds, number, ticket))

    def drop(self, ticket: T) -> None:
        """Stop watching a ticket; its entry goes when it is due, or when such entries are the most."""
        del self._numbers[ticket]
        if len(self._heap) > 2 * len(self._numbers) + 16:
            self._heap = [entry for entry in self._heap if self._numbers.get(entry[2]) == entry[1]]
            heapify(self._heap)

    def soonest(self) -> float | None:
        """When the next ticket gives up; None if none is watched."""
        while self._heap:
            deadline_seconds, number, ticket = self._heap[0]
            if self._numbers.get(ticket) == number:
                return deadline_seconds
            heappop(self._heap)
        return None

    def due(self, now: float) -> T | None:
        """Return a ticket whose time is up, the most overdue one, without dropping it."""
        soonest = self.soonest()
        return self._heap[0][2] if soonest is not None and soonest <= now else None


class FairQueue(Generic[T]):
    """The waiting line of one alias and the rungs that may answer."""

    def __init__(self) -> None:
        # Keys by turn; of each, its tickets by age. A key without tickets is forgotten.
        self._keys: OrderedDict[str, OrderedDict[T, None]] = OrderedDict()
        self._key_of: dict[T, str] = {}
        self._deadlines: Deadlines[T] = Deadlines()

    def __len__(self) -> int:
        return len(self._key_of)

    def __contains__(self, ticket: object) -> bool:
        return ticket in self._key_of

    def join(self, key: str, ticket: T, deadline_seconds: float) -> None:
        """Stand in line, behind the key's own; a key that is new here has its turn last."""
        assert ticket not in self._key_of, "a ticket that waits already"
        self._keys.setdefault(key, OrderedDict())[ticket] = None
        self._key_of[ticket] = key
        self._deadlines.add(ticket, deadline_seconds)

    def leave(self, ticket: T) -> None:
        """Take a ticket out wherever it stands; one that doesn't wait is no matter."""
        key = self._key_of.pop(ticket, None)
        if key is None:
            return
        own = self._keys[key]
        del own[ticket]
        if not own:
            del self._keys[key]
        self._deadlines.drop(ticket)

    def next(self) -> T | None:
        """Take out the oldest ticket of the key whose turn it is; None if nobody waits."""
        if not self._keys:
            return None
        key, own = next(iter(self._keys.items()))
        ticket = next(iter(own))
        self._keys.move_to_end(key)
        self.leave(ticket)
        return ticket

    def ahead(self, key: str) -> int:
        """How many will be served before a ticket that the key adds now, at most, if nobody else joins."""
        held = self.held(key)
        return min((held + 1) * self.keys_with(key) - 1, len(self))

    def held(self, key: str) -> int:
        """How many of the key's tickets wait."""
        return len(self._keys.get(key, ()))

    def keys_with(self, key: str) -> int:
        """How many keys wait, this one included."""
        return len(self._keys) + (key not in self._keys)

    def newest_of_greediest(self) -> T:
        """Return the last to join of the key that holds the most; somebody must wait."""
        greediest = max(self._keys, key=self.held)
        return next(reversed(self._keys[greediest]))

    def expired(self, now: float) -> list[T]:
        """Take out the tickets whose time is up, the most overdue first."""
        gone = []
        while (ticket := self._deadlines.due(now)) is not None:
            self.leave(ticket)
            gone.append(ticket)
        return gone

    def soonest_deadline(self) -> float | None:
        """When the next ticket gives up; None if nobody waits."""
        return self._deadlines.soonest()
