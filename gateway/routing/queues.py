"""All waiting lines, within bounds: when there is no room, whoever holds more than a fair share makes some.

A fair share is a bound divided by the keys that wait, the newcomer's included. As long as something doesn't fit
although the newcomer stays within its share, some other key holds more than a share: that one is pushed out.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from gateway.routing.queue import FairQueue

T = TypeVar("T", bound=Hashable)
N = TypeVar("N", bound=Hashable)


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
