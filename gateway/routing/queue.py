"""Queues of requests that wait for a replica: keys take turns; within a key, first come, first served.

A waiter is any hashable object that stands for one waiting request. Nothing here wakes, rejects or times out a waiter:
the owner of the queues does. Deadlines are on the monotonic clock.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)
N = TypeVar("N", bound=Hashable)


class DeadlineHeap(Generic[T]):
    """Waiters by deadline: a heap in which removed entries stay until they surface or become the majority."""

    def __init__(self) -> None:
        # The number of a waiter's valid entry; entries with other numbers were removed.
        self._numbers: dict[T, int] = {}
        self._heap: list[tuple[float, int, T]] = []
        self._next_number = 0

    def add(self, waiter: T, deadline_seconds: float) -> None:
        """Add a waiter, which must not be in the heap."""
        number = self._next_number = self._next_number + 1
        self._numbers[waiter] = number
        heappush(self._heap, (deadline_seconds, number, waiter))

    def drop(self, waiter: T) -> None:
        """Remove a waiter; KeyError if it is not in the heap."""
        del self._numbers[waiter]
        if len(self._heap) > 2 * len(self._numbers) + 16:
            self._heap = [entry for entry in self._heap if self._numbers.get(entry[2]) == entry[1]]
            heapify(self._heap)

    def soonest(self) -> float | None:
        """The earliest deadline; None if the heap is empty."""
        while self._heap:
            deadline_seconds, number, waiter = self._heap[0]
            if self._numbers.get(waiter) == number:
                return deadline_seconds
            heappop(self._heap)
        return None

    def due(self, now: float) -> T | None:
        """Return the waiter with the earliest deadline if that has passed, without removing it."""
        soonest = self.soonest()
        return self._heap[0][2] if soonest is not None and soonest <= now else None


class FairQueue(Generic[T]):
    """The queue of one alias and the rungs that may answer."""

    def __init__(self) -> None:
        # Keys in the order of their turns, each with its waiters by age. A key without waiters is removed.
        self._keys: OrderedDict[str, OrderedDict[T, None]] = OrderedDict()
        self._key_of: dict[T, str] = {}
        self._deadlines: DeadlineHeap[T] = DeadlineHeap()

    def __len__(self) -> int:
        return len(self._key_of)

    def __contains__(self, waiter: object) -> bool:
        return waiter in self._key_of

    def join(self, key: str, waiter: T, deadline_seconds: float) -> None:
        """Add a waiter behind the others of its key. The turn of a new key is last."""
        assert waiter not in self._key_of, "the waiter is already in this queue"
        self._keys.setdefault(key, OrderedDict())[waiter] = None
        self._key_of[waiter] = key
        self._deadlines.add(waiter, deadline_seconds)

    def leave(self, waiter: T) -> None:
        """Remove a waiter; no effect if it is not in the queue."""
        key = self._key_of.pop(waiter, None)
        if key is None:
            return
        waiters = self._keys[key]
        del waiters[waiter]
        if not waiters:
            del self._keys[key]
        self._deadlines.drop(waiter)

    def next(self) -> T | None:
        """Remove and return the oldest waiter of the key whose turn it is; None if the queue is empty."""
        if not self._keys:
            return None
        key, waiters = next(iter(self._keys.items()))
        waiter = next(iter(waiters))
        self._keys.move_to_end(key)
        self.leave(waiter)
        return waiter

    def ahead(self, key: str) -> int:
        """The maximum number of waiters served before one that the key adds now, if no other one joins."""
        return min((self.count(key) + 1) * self.keys_with(key) - 1, len(self))

    def count(self, key: str) -> int:
        """The number of waiters of a key."""
        return len(self._keys.get(key, ()))

    def keys_with(self, key: str) -> int:
        """The number of keys that have waiters, counting this one in any case."""
        return len(self._keys) + (key not in self._keys)

    def newest_of_largest(self) -> T:
        """Return the newest waiter of the key with the most waiters; the queue must not be empty."""
        largest = max(self._keys, key=self.count)
        return next(reversed(self._keys[largest]))

    def expired(self, now: float) -> list[T]:
        """Remove and return the waiters whose deadline has passed, the earliest first."""
        expired = []
        while (waiter := self._deadlines.due(now)) is not None:
            self.leave(waiter)
            expired.append(waiter)
        return expired

    def soonest_deadline(self) -> float | None:
        """The earliest deadline; None if the queue is empty."""
        return self._deadlines.soonest()


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """The maximum number of waiters per queue and in all queues, and of bytes of their request bodies."""

    max_per_queue: int = 1000
    max_waiters: int = 4000
    max_bytes: int = 256 * 2**20


@dataclass(slots=True)
class _KeyUsage(Generic[T]):
    """The waiters of one key in all queues, by age, and the bytes of their bodies."""

    waiters: dict[T, None] = field(default_factory=dict)
    bytes: int = 0


class Queues(Generic[N, T]):
    """Queues by name with common limits.

    When a limit is reached, a key that is below its equal share of it evicts the newest waiters of the keys that use
    the most; other keys are rejected.
    """

    def __init__(self, limits: QueueLimits) -> None:
        self.limits = limits  # may be replaced; waiters beyond lower limits stay
        # Queues in the order of their turns. An empty queue is removed.
        self._queues: OrderedDict[N, FairQueue[T]] = OrderedDict()
        self._usage: dict[str, _KeyUsage[T]] = {}
        self._entries: dict[T, tuple[N, str, int]] = {}  # queue, key and body bytes of each waiter
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, waiter: object) -> bool:
        return waiter in self._entries

    def __iter__(self) -> Iterator[T]:
        """All waiters; queues may be changed meanwhile."""
        return iter(tuple(self._entries))

    @property
    def waiting_bytes(self) -> int:
        """The bytes of the request bodies of all waiters."""
        return self._bytes

    def waiting(self, name: N) -> int:
        """The number of waiters in one queue."""
        queue = self._queues.get(name)
        return 0 if queue is None else len(queue)

    def ahead(self, name: N, key: str) -> int:
        """The maximum number of waiters of this queue served before one that the key adds now."""
        queue = self._queues.get(name)
        return 0 if queue is None else queue.ahead(key)

    def join(self, name: N, key: str, waiter: T, deadline_seconds: float, body_bytes: int) -> list[T] | None:
        """Add a waiter to a queue; returns the evicted waiters, which the caller rejects, or None if it is rejected."""
        if self._beyond_share(name, key, body_bytes):
            return None
        evicted = self._make_room(name, body_bytes)
        self._queues.setdefault(name, FairQueue()).join(key, waiter, deadline_seconds)
        usage = self._usage.setdefault(key, _KeyUsage())
        usage.waiters[waiter] = None
        usage.bytes += body_bytes
        self._entries[waiter] = name, key, body_bytes
        self._bytes += body_bytes
        return evicted

    def leave(self, waiter: T) -> None:
        """Remove a waiter; no effect if it is in no queue."""
        if waiter in self._entries:
            self._queue_of(waiter).leave(waiter)
            self._release(waiter)

    def next(self, serves: Callable[[N], bool] | None = None) -> T | None:
        """Remove and return the next waiter of the next queue for which `serves` is true; None if there is none.

        `serves` says whether the replica that has room may answer a queue; without it, any queue is served.
        """
        for name, queue in self._queues.items():
            if serves is None or serves(name):
                waiter = queue.next()
                assert waiter is not None, "an empty queue was not removed"
                self._queues.move_to_end(name)
                self._release(waiter)
                return waiter
        return None

    def expired(self, now: float) -> list[T]:
        """Remove and return the waiters whose deadline has passed; all waiters if `now` is inf."""
        expired = [waiter for queue in self._queues.values() for waiter in queue.expired(now)]
        for waiter in expired:
            self._release(waiter)
        return expired

    def soonest_deadline(self) -> float | None:
        """The earliest deadline of all queues; None if they are empty."""
        deadlines = [queue.soonest_deadline() for queue in self._queues.values()]
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

    def _beyond_share(self, name: N, key: str, body_bytes: int) -> bool:
        """Whether the key would exceed its equal share of a limit that has been reached."""
        limits = self.limits
        queue = self._queues.get(name)
        usage = self._usage.get(key)
        keys = len(self._usage) + (usage is None)
        count, used_bytes = (0, 0) if usage is None else (len(usage.waiters), usage.bytes)
        if self._overfull_queue(name) and (
            queue is None or (queue.count(key) + 1) * queue.keys_with(key) > limits.max_per_queue
        ):
            return True
        if self._overfull() and (count + 1) * keys > limits.max_waiters:
            return True
        return self._overfull_bytes(body_bytes) and (used_bytes + body_bytes) * keys > limits.max_bytes

    def _make_room(self, name: N, body_bytes: int) -> list[T]:
        """Evict the newest waiters of the largest keys until one more fits."""
        evicted: list[T] = []
        while self._overfull_queue(name):
            evicted.append(self._evict(self._queues[name].newest_of_largest()))
        while self._overfull():
            largest = max(self._usage.values(), key=lambda usage: len(usage.waiters))
            evicted.append(self._evict(next(reversed(largest.waiters))))
        while self._overfull_bytes(body_bytes):
            largest = max(self._usage.values(), key=lambda usage: usage.bytes)
            evicted.append(self._evict(next(reversed(largest.waiters))))
        return evicted

    def _overfull_queue(self, name: N) -> bool:
        return self.waiting(name) >= self.limits.max_per_queue

    def _overfull(self) -> bool:
        return len(self) >= self.limits.max_waiters

    def _overfull_bytes(self, body_bytes: int) -> bool:
        return self._bytes + body_bytes > self.limits.max_bytes

    def _evict(self, waiter: T) -> T:
        self.leave(waiter)
        return waiter

    def _queue_of(self, waiter: T) -> FairQueue[T]:
        return self._queues[self._entries[waiter][0]]

    def _release(self, waiter: T) -> None:
        """Remove a waiter that has left its queue from the counts."""
        name, key, body_bytes = self._entries.pop(waiter)
        if self.waiting(name) == 0:
            self._queues.pop(name, None)
        usage = self._usage[key]
        del usage.waiters[waiter]
        usage.bytes -= body_bytes
        if not usage.waiters:
            del self._usage[key]
        self._bytes -= body_bytes
