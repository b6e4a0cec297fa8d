"""The registry of replicas: each with its state, its source and its number of requests in flight.

The registry is the only owner of the in-flight counts. Every entry belongs to one source, the one that added it:

=========  ==============================  ===================  ===================
call       own replica                     another source's     not in the registry
=========  ==============================  ===================  ===================
put        changes it                      `ReplicaConflict`    adds it
move       changes its state               `ReplicaConflict`    `NoSuchReplica`
remove     removes it                      no effect            no effect
keep_only  removes it if it is not listed  no effect            no effect
=========  ==============================  ===================  ===================

A source may clean up late, when another one already uses the id again. Hence `remove` has no effect there.
"""

import asyncio
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

from serving.errors import NoSuchReplica, ReplicaConflict
from serving.replica import DIRECT, Replica, ReplicaStatus, State


@dataclass(frozen=True, slots=True)
class _Entry:
    replica: Replica
    source: str
    state: State
    reason: str
    since_seconds: float


@dataclass(slots=True, eq=False)
class Registry:
    """Replicas by id. Every change is one synchronous step; `changed()` wakes the tasks that wait for one."""

    clock: Callable[[], float] = time.monotonic
    _entries: dict[str, _Entry] = field(default_factory=dict)
    # Separate from the entries: a replica that leaves and returns keeps the count of its running requests.
    _in_flight: dict[str, int] = field(default_factory=dict)
    _ready: dict[str, tuple[Replica, ...]] = field(default_factory=dict)
    _change: asyncio.Event = field(default_factory=asyncio.Event)
    _observers: list[Callable[[], None]] = field(default_factory=list)
    _deferring: bool = False  # within a block of `changing`
    _deferred: bool = False  # something has changed in it
    # Separate from `_change`: under low load a replica becomes idle after every request, and few tasks wait for that.
    _idle: asyncio.Event | None = None

    def __contains__(self, replica_id: str) -> bool:
        """Whether a replica is in the registry, in any state."""
        return replica_id in self._entries

    def source(self, name: str) -> "ReplicaSource":
        """Return the handle through which a source writes; handles of the same name own the same replicas."""
        return ReplicaSource(name, self)

    def put(
        self,
        replica: Replica,
        state: State,
        reason: str = "",
        since_seconds: float | None = None,
        *,
        source: str = DIRECT,
    ) -> None:
        """Add a replica, or change its description or state; ReplicaConflict if another source owns its id.

        `since_seconds` is when the state began (monotonic), by default now. An identical entry keeps its time.
        """
        known = self._entries.get(replica.id)
        if known is not None:
            _check_owner(known, source)
            if (known.replica, known.state, known.reason) == (replica, state, reason):
                return
        since = self.clock() if since_seconds is None else since_seconds
        self._entries[replica.id] = _Entry(replica, source, state, reason, since)
        self._announce()

    def move(self, replica_id: str, state: State, reason: str = "", *, source: str = DIRECT) -> None:
        """Change a replica's state. Raises NoSuchReplica, or ReplicaConflict if another source owns it."""
        self.put(self._entry(replica_id).replica, state, reason, source=source)

    def remove(self, replica_id: str, *, source: str = DIRECT) -> None:
        """Remove a replica; no effect if it is not in the registry or another source owns it."""
        entry = self._entries.get(replica_id)
        if entry is not None and entry.source == source:
            del self._entries[replica_id]
            self._announce()

    def snapshot(self) -> tuple[ReplicaStatus, ...]:
        """All replicas as immutable values, sorted by id."""
        return tuple(self.status(replica_id) for replica_id in sorted(self._entries))

    def status(self, replica_id: str) -> ReplicaStatus:
        """One replica; NoSuchReplica if it is not in the registry."""
        entry = self._entry(replica_id)
        in_flight = self._in_flight.get(replica_id, 0)
        return ReplicaStatus(entry.replica, entry.state, entry.reason, entry.since_seconds, in_flight, entry.source)

    @property
    def ready(self) -> Mapping[str, tuple[Replica, ...]]:
        """The ready replicas by variant, sorted by id; a live view, always the same mapping object.

        A replica with LoRA adapters is there under its variant and, as a view, under that of each adapter.
        """
        return self._ready

    @property
    def in_flight(self) -> Mapping[str, int]:
        """The number of this process's requests in flight by replica id, without zeros; a live view, too."""
        return self._in_flight

    def take(self, replica_id: str) -> Replica:
        """Count one more request in flight, until `give_back`; NoSuchReplica if the replica has left the registry."""
        replica = self._entry(replica_id).replica
        self._in_flight[replica_id] = self._in_flight.get(replica_id, 0) + 1
        return replica

    def give_back(self, replica_id: str) -> None:
        """Count one request less; must be called once per `take`, also after the replica has left the registry."""
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
        """Call an observer synchronously at every change while the block runs."""
        self._observers.append(observer)
        try:
            yield
        finally:
            self._observers.remove(observer)

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Announce all changes of a block at its end, as one; the block must not await."""
        if self._deferring:
            yield
            return
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False
            if self._deferred:
                self._deferred = False
                self._announce()

    async def changed(self) -> None:
        """Wait until a replica is added, changed or removed."""
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
        if self._deferring:
            self._deferred = True
            return
        ready: dict[str, list[Replica]] = {}
        for _, entry in sorted(self._entries.items()):
            if entry.state is State.READY:
                replica = entry.replica
                for each in (replica, *(replica.with_adapter(adapter) for adapter in replica.adapters)):
                    ready.setdefault(each.variant, []).append(each)
        self._ready.clear()
        self._ready.update({variant: tuple(replicas) for variant, replicas in ready.items()})
        for observer in self._observers:
            observer()
        waiting, self._change = self._change, asyncio.Event()
        waiting.set()


@dataclass(frozen=True, slots=True)
class ReplicaSource:
    """A writer of the registry: adds replicas, and changes and removes only those that it owns (table above)."""

    name: str
    _registry: Registry

    def put(self, replica: Replica, state: State, reason: str = "", since_seconds: float | None = None) -> None:
        """Add or change a replica; see `Registry.put`."""
        self._registry.put(replica, state, reason, since_seconds, source=self.name)

    def move(self, replica_id: str, state: State, reason: str = "") -> None:
        """Change a replica's state; see `Registry.move`."""
        self._registry.move(replica_id, state, reason, source=self.name)

    def remove(self, replica_id: str) -> None:
        """Remove a replica; see `Registry.remove`."""
        self._registry.remove(replica_id, source=self.name)

    def changing(self) -> AbstractContextManager[None]:
        """Announce several changes as one; see `Registry.changing`."""
        return self._registry.changing()

    def keep_only(self, replica_ids: Collection[str]) -> None:
        """Remove the replicas of this source whose ids are not among `replica_ids`."""
        for status in self._registry.snapshot():
            if status.replica.id not in replica_ids:
                self.remove(status.replica.id)


def _check_owner(entry: _Entry, source: str) -> None:
    if entry.source != source:
        raise ReplicaConflict(
            f"replica {entry.replica.id!r} belongs to the source {entry.source!r}, so the source {source!r} cannot "
            f"add or change it; rename its variant in one of the two"
        )
