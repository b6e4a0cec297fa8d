"""The table of replicas: who is there, in what state, with how many requests. The only owner of in-flight counts."""

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from serving.errors import NoSuchReplica
from serving.replica import Replica, ReplicaStatus, State


@dataclass(frozen=True, slots=True)
class _Entry:
    replica: Replica
    state: State
    reason: str
    since_seconds: float


@dataclass(slots=True, eq=False)
class Registry:
    """Replicas by id. Every change is one synchronous step; `changed()` wakes those who wait for one."""

    clock: Callable[[], float] = time.monotonic
    _entries: dict[str, _Entry] = field(default_factory=dict)
    # Apart from the entries, so that a replica that leaves and comes back keeps the count of its running requests.
    _in_flight: dict[str, int] = field(default_factory=dict)
    _ready: dict[str, tuple[Replica, ...]] = field(default_factory=dict)
    _change: asyncio.Event = field(default_factory=asyncio.Event)
    _observers: list[Callable[[], None]] = field(default_factory=list)
    # Apart from the changes: a quiet replica becomes idle after every request, and nearly nobody wants to know.
    _idle: asyncio.Event | None = None

    def put(self, replica: Replica, state: State, reason: str = "", since_seconds: float | None = None) -> None:
        """Add a replica, or say that it is in another state; since now, or since when somebody else says."""
        known = self._entries.get(replica.id)
        if known and (known.replica, known.state, known.reason) == (replica, state, reason):
            return
        since = self.clock() if since_seconds is None else since_seconds
        self._entries[replica.id] = _Entry(replica, state, reason, since)
        self._announce()

    def move(self, replica_id: str, state: State, reason: str = "") -> None:
        """Change the state of a replica that is there."""
        self.put(self._entry(replica_id).replica, state, reason)

    def remove(self, replica_id: str) -> None:
        """Forget a replica."""
        if self._entries.pop(replica_id, None):
            self._announce()

    def snapshot(self) -> tuple[ReplicaStatus, ...]:
        """Everything there is, as values; sorted by id."""
        return tuple(self.status(replica_id) for replica_id in sorted(self._entries))

    def status(self, replica_id: str) -> ReplicaStatus:
        """One replica; NoSuchReplica if it left."""
        entry = self._entry(replica_id)
        in_flight = self._in_flight.get(replica_id, 0)
        return ReplicaStatus(entry.replica, entry.state, entry.reason, entry.since_seconds, in_flight)

    @property
    def ready(self) -> Mapping[str, tuple[Replica, ...]]:
        """The ready replicas of each variant, by id; the same mapping for ever, always true."""
        return self._ready

    @property
    def in_flight(self) -> Mapping[str, int]:
        """How many requests each replica answers for us, of those that answer any; always true, too."""
        return self._in_flight

    @contextmanager
    def lease(self, replica_id: str) -> Iterator[Replica]:
        """Count one request on a replica while the block runs; NoSuchReplica if it left meanwhile."""
        replica = self.take(replica_id)
        try:
            yield replica
        finally:
            self.give_back(replica_id)

    def take(self, replica_id: str) -> Replica:
        """Count one request on a replica, which whoever takes it gives back; NoSuchReplica if it left meanwhile."""
        replica = self._entry(replica_id).replica
        self._in_flight[replica_id] = self._in_flight.get(replica_id, 0) + 1
        return replica

    def give_back(self, replica_id: str) -> None:
        """Count it down again."""
        left = self._in_flight[replica_id] - 1
        if left:
            self._in_flight[replica_id] = left
            return
        del self._in_flight[replica_id]
        if self._idle is not None:
            waiting, self._idle = self._idle, None
            waiting.set()

    @contextmanager
    def observed(self, observer: Callable[[], None]) -> Iterator[None]:
        """Call an observer within the step of every change while the block runs."""
        self._observers.append(observer)
        try:
            yield
        finally:
            self._observers.remove(observer)

    async def changed(self) -> None:
        """Wait for the next change of a state."""
        await self._change.wait()

    async def idle(self, replica_id: str) -> None:
        """Wait until a replica has no request in flight."""
        while self._in_flight.get(replica_id):
            self._idle = self._idle or asyncio.Event()
            await self._idle.wait()

    def _entry(self, replica_id: str) -> _Entry:
        try:
            return self._entries[replica_id]
        except KeyError:
            raise NoSuchReplica(f"replica {replica_id!r} is not in the registry") from None

    def _announce(self) -> None:
        ready: dict[str, tuple[Replica, ...]] = {}
        for _, entry in sorted(self._entries.items()):
            if entry.state is State.READY:
                variant = entry.replica.variant
                ready[variant] = (*ready.get(variant, ()), entry.replica)
        self._ready.clear()
        self._ready.update(ready)
        for observer in self._observers:
            observer()
        waiting, self._change = self._change, asyncio.Event()
        waiting.set()
