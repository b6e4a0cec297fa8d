"""What is held against replicas: breakers of those that fail, marks of those that are full.

The rules are gateway.routing.breaker's and gateway.routing.overload's; this is their only state. A replica against
which nothing is held isn't in it, which is how it is nearly always.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from math import inf
from typing import TypeVar

from gateway.proxy.leases import Lease
from gateway.routing import breaker, overload
from gateway.routing.breaker import HEALTHY, Breaker
from gateway.routing.overload import NOT_OVERLOADED, Overload
from serving.registry import Registry


class OutlierDetection:
    """Owns breakers and marks by replica; both mappings are the same for ever, and always true."""

    def __init__(self, registry: Registry, clock: Callable[[], float]) -> None:
        self._registry = registry
        self._clock = clock
        self._breakers: dict[str, Breaker] = {}
        self._marks: dict[str, Overload] = {}

    @property
    def breakers(self) -> Mapping[str, Breaker]:
        """Of replicas that have failed lately."""
        return self._breakers

    @property
    def marks(self) -> Mapping[str, Overload]:
        """Of replicas that had no room lately."""
        return self._marks

    def states(self) -> Mapping[str, breaker.BreakerState]:
        """The breakers' states; who isn't in it is closed."""
        now = self._clock()
        return {replica_id: held.state(now) for replica_id, held in self._breakers.items()}

    def asked(self, replica_id: str, now: float) -> float | None:
        """Note that a request goes to a replica; if that is a breaker's probe, say when it is believed lost."""
        held = self._breakers.get(replica_id) if self._breakers else None
        if held is None:
            return None
        after = self._breakers[replica_id] = breaker.probing(held, now)
        return after.probe_until if after is not held else None

    def ended(self, lease: Lease) -> None:
        """Give a probe that showed nothing back."""
        replica_id = lease.choice.replica.id
        held = self._breakers.get(replica_id)
        if held is not None and held.probe_until == lease.probe_until:
            self._breakers[replica_id] = breaker.abandoned(held)

    def succeeded(self, lease: Lease) -> None:
        """Hold nothing against a replica that answers, or less than before."""
        if not self._breakers and not self._marks:
            return
        replica_id, now = lease.choice.replica.id, self._clock()
        held = self._breakers.get(replica_id)
        if held is not None:
            after = breaker.succeeded(held, now, asked_at=lease.asked_at)
            _keep(self._breakers, replica_id, after, HEALTHY)
        mark = self._marks.get(replica_id)
        if mark is not None:
            _keep(self._marks, replica_id, overload.accepted(mark, now), NOT_OVERLOADED)

    def failed(self, lease: Lease) -> None:
        """Hold a failure against a replica."""
        if self._has_gone(lease):
            return
        replica_id = lease.choice.replica.id
        held = self._breakers.get(replica_id, HEALTHY)
        self._breakers[replica_id] = breaker.failed(held, self._clock(), asked_at=lease.asked_at)

    def refused(self, lease: Lease, retry_after_seconds: float | None) -> None:
        """Spare a replica that has no room."""
        if self._has_gone(lease):
            return
        replica_id = lease.choice.replica.id
        mark = self._marks.get(replica_id, NOT_OVERLOADED)
        # Refused although nobody of ours was there says nothing about how many it takes.
        others = self._registry.in_flight[replica_id] - 1 or inf
        self._marks[replica_id] = overload.refused(mark, self._clock(), retry_after_seconds, at_once=others)

    def keep_only(self, ready: Collection[str]) -> None:
        """Forget what was held against replicas that aren't ready: when they are, they will be others."""
        for gone in self._breakers.keys() - ready:
            del self._breakers[gone]
        for gone in self._marks.keys() - ready:
            del self._marks[gone]

    def changes_at(self, now: float) -> Iterator[float]:
        """When replicas that are spared or barred now may be asked again."""
        yield from (mark.until for mark in self._marks.values() if mark.until > now)
        for held in self._breakers.values():
            if not held.admits(now):
                yield max(held.opened_at + held.open_seconds, held.probe_until)

    def _has_gone(self, lease: Lease) -> bool:
        """Tell whether a replica isn't ready any more."""
        ready = self._registry.ready.get(lease.choice.variant.name, ())
        return all(replica.id != lease.choice.replica.id for replica in ready)


Held = TypeVar("Held")


def _keep(table: dict[str, Held], replica_id: str, after: Held, nothing: Held) -> None:
    if after is nothing:
        del table[replica_id]
    else:
        table[replica_id] = after
