"""Who waits for a replica, and whose turn it is: fair between keys, first come, first served within a key.

Each structure has one owner, which also wakes, refuses and times out: nothing here does. Deadlines are on the
monotonic clock. A ticket is anything hashable that stands for one waiting request.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)
N = TypeVar("N", bound=Hashable)


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


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """How many requests may wait in one line and in all, and how many bytes their bodies may take."""

    most_in_line: int = 1000
    most: int = 4000
    most_bytes: int = 256 * 2**20


@dataclass(slots=True)
class _Held(Generic[T]):
    """What one key has waiting, in all lines; tickets by age."""

    tickets: dict[T, None] = field(default_factory=dict)
    bytes: int = 0


class Queues(Generic[N, T]):
    """Waiting lines by name, and what each key holds in them."""

    def __init__(self, bounds: QueueLimits) -> None:
        self._bounds = bounds
        # Lines by turn; one in which nobody waits is forgotten.
        self._lines: OrderedDict[N, FairQueue[T]] = OrderedDict()
        self._held: dict[str, _Held[T]] = {}
        self._places: dict[T, tuple[N, str, int]] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, ticket: object) -> bool:
        return ticket in self._places

    def __iter__(self) -> Iterator[T]:
        """Every ticket that waits."""
        return iter(tuple(self._places))

    @property
    def waiting_bytes(self) -> int:
        """What the bodies that wait take."""
        return self._bytes

    def waiting(self, name: N) -> int:
        """How many wait in one line."""
        line = self._lines.get(name)
        return 0 if line is None else len(line)

    def ahead(self, name: N, key: str) -> int:
        """How many of this line will be served before a ticket that the key adds now, at most."""
        line = self._lines.get(name)
        return 0 if line is None else line.ahead(key)

    def join(self, name: N, key: str, ticket: T, deadline_seconds: float, body_bytes: int) -> list[T] | None:
        """Stand in line; None is a refusal, a list are the tickets pushed out, which the caller refuses instead."""
        if self._beyond_share(name, key, body_bytes):
            return None
        pushed_out = self._make_room(name, body_bytes)
        self._lines.setdefault(name, FairQueue()).join(key, ticket, deadline_seconds)
        held = self._held.setdefault(key, _Held())
        held.tickets[ticket] = None
        held.bytes += body_bytes
        self._places[ticket] = name, key, body_bytes
        self._bytes += body_bytes
        return pushed_out

    def leave(self, ticket: T) -> None:
        """Take a ticket out wherever it stands; one that doesn't wait is no matter."""
        if ticket in self._places:
            self._line_of(ticket).leave(ticket)
            self._forget(ticket)

    def next(self, serves: Callable[[N], bool] | None = None) -> T | None:
        """Take out whose turn it is in the next of the lines that the replica with room serves; None if there is none.

        Without `serves`, it serves them all.
        """
        for name, line in self._lines.items():
            if serves is None or serves(name):
                ticket = line.next()
                assert ticket is not None, "an empty line that wasn't forgotten"
                self._lines.move_to_end(name)
                self._forget(ticket)
                return ticket
        return None

    def expired(self, now: float) -> list[T]:
        """Take out the tickets whose time is up; all of them, with `inf`."""
        gone = [ticket for line in self._lines.values() for ticket in line.expired(now)]
        for ticket in gone:
            self._forget(ticket)
        return gone

    def soonest_deadline(self) -> float | None:
        """When the next ticket gives up; None if nobody waits."""
        deadlines = [line.soonest_deadline() for line in self._lines.values()]
        return min((each for each in deadlines if each is not None), default=None)

    def _beyond_share(self, name: N, key: str, body_bytes: int) -> bool:
        """Tell whether the key would hold more than its share of something that has run out."""
        bounds = self._bounds
        line = self._lines.get(name)
        held = self._held.get(key)
        keys = len(self._held) + (held is None)
        count, held_bytes = (0, 0) if held is None else (len(held.tickets), held.bytes)
        if self._overfull_line(name) and (
            line is None or (line.held(key) + 1) * line.keys_with(key) > bounds.most_in_line
        ):
            return True
        if self._overfull() and (count + 1) * keys > bounds.most:
            return True
        return self._overfull_bytes(body_bytes) and (held_bytes + body_bytes) * keys > bounds.most_bytes

    def _make_room(self, name: N, body_bytes: int) -> list[T]:
        """Push out the newest tickets of the greediest keys until one more fits."""
        pushed_out: list[T] = []
        while self._overfull_line(name):
            pushed_out.append(self._push_out(self._lines[name].newest_of_greediest()))
        while self._overfull():
            greediest = max(self._held.values(), key=lambda held: len(held.tickets))
            pushed_out.append(self._push_out(next(reversed(greediest.tickets))))
        while self._overfull_bytes(body_bytes):
            greediest = max(self._held.values(), key=lambda held: held.bytes)
            pushed_out.append(self._push_out(next(reversed(greediest.tickets))))
        return pushed_out

    def _overfull_line(self, name: N) -> bool:
        return self.waiting(name) >= self._bounds.most_in_line

    def _overfull(self) -> bool:
        return len(self) >= self._bounds.most

    def _overfull_bytes(self, body_bytes: int) -> bool:
        return self._bytes + body_bytes > self._bounds.most_bytes

    def _push_out(self, ticket: T) -> T:
        self.leave(ticket)
        return ticket

    def _line_of(self, ticket: T) -> FairQueue[T]:
        return self._lines[self._places[ticket][0]]

    def _forget(self, ticket: T) -> None:
        """Strike a ticket that has left its line off all accounts."""
        name, key, body_bytes = self._places.pop(ticket)
        if self.waiting(name) == 0:
            self._lines.pop(name, None)
        held = self._held[key]
        del held.tickets[ticket]
        held.bytes -= body_bytes
        if not held.tickets:
            del self._held[key]
        self._bytes -= body_bytes
