"""Outlier detection: breakers of replicas that fail, and overloads of those that refuse requests.

The rules are gateway.routing.breaker's and gateway.routing.overload's; this owns their state. A replica without an
entry is closed and not overloaded, which nearly all are nearly always.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from math import inf
from typing import TypeVar

from gateway.proxy.leases import BreakerChange, Lease
from gateway.routing import breaker, overload
from gateway.routing.breaker import HEALTHY, Breaker
from gateway.routing.overload import NOT_OVERLOADED, Overload
from serving.registry import Registry

T = TypeVar("T")


class OutlierDetection:
    """Owns breakers and overloads by replica; a Ledger: the outcome of a lease counts when it is left."""

    def __init__(self, registry: Registry, clock: Callable[[], float]) -> None:
        self._registry = registry
        self._clock = clock
        self._breakers: dict[str, Breaker] = {}
        self._overloads: dict[str, Overload] = {}

    @property
    def breakers(self) -> Mapping[str, Breaker]:
        """Of replicas that have failed lately; a live view."""
        return self._breakers

    @property
    def overloads(self) -> Mapping[str, Overload]:
        """Of replicas that have refused requests lately; a live view."""
        return self._overloads

    def states(self) -> Mapping[str, breaker.BreakerState]:
        """The states of the breakers; a replica that is not in it is closed."""
        now = self._clock()
        return {replica_id: each.state(now) for replica_id, each in self._breakers.items()}

    def enter(self, lease: Lease) -> None:
        """Mark the lease as the probe of a half-open breaker, if it is one."""
        if not self._breakers:
            return
        replica_id = lease.replica.id
        before = self._breakers.get(replica_id)
        if before is not None:
            after = self._breakers[replica_id] = breaker.probing(before, lease.acquired_at)
            lease.probe_until = after.probe_until if after is not before else None

    def leave(self, lease: Lease) -> None:
        """Apply the outcome of a lease; an abandoned probe leaves the breaker half-open."""
        outcome = lease.outcome
        if outcome == "succeeded":
            if not self._breakers and not self._overloads:
                return
            self._succeeded(lease)
        elif outcome == "failed":
            lease.breaker_change = self._failed(lease) if self._is_ready(lease) else None
        elif outcome == "refused" and self._is_ready(lease):
            self._refused(lease)
        after = self._breakers.get(lease.replica.id)
        if after is not None and after.probe_until == lease.probe_until:
            self._breakers[lease.replica.id] = breaker.abandoned(after)

    def was_suspect(self, lease: Lease) -> bool:
        """Whether a lease was of a replica whose breaker was open or half-open already."""
        known = self._breakers.get(lease.replica.id)
        return known is not None and known.tripped and lease.acquired_at >= known.opened_at

    def retract(self, lease: Lease) -> None:
        """Take back the failure of a lease that has ended: it says nothing of the replica."""
        replica_id, change = lease.replica.id, lease.breaker_change
        known = self._breakers.get(replica_id)
        if known is not None and change is not None:
            _set_or_delete(self._breakers, replica_id, breaker.retracted(known, *change), HEALTHY)

    def keep_only(self, ready: Collection[str]) -> None:
        """Forget replicas that are not ready: when they are ready again, they are new."""
        for gone in self._breakers.keys() - ready:
            del self._breakers[gone]
        for gone in self._overloads.keys() - ready:
            del self._overloads[gone]

    def changes_at(self, now: float) -> Iterator[float]:
        """When replicas that are spared or barred now may be asked again."""
        yield from (each.until for each in self._overloads.values() if each.until > now)
        for each in self._breakers.values():
            if not each.admits(now):
                yield max(each.opened_at + each.open_seconds, each.probe_until)

    def _failed(self, lease: Lease) -> BreakerChange:
        before = self._breakers.get(lease.replica.id, HEALTHY)
        after = breaker.failed(before, self._clock(), asked_at=lease.acquired_at, timed_out=lease.timed_out)
        self._breakers[lease.replica.id] = after
        return before, after

    def _succeeded(self, lease: Lease) -> None:
        replica_id, now = lease.replica.id, self._clock()
        before = self._breakers.get(replica_id)
        if before is not None:
            after = breaker.succeeded(before, now, asked_at=lease.acquired_at)
            _set_or_delete(self._breakers, replica_id, after, HEALTHY)
        overloaded = self._overloads.get(replica_id)
        if overloaded is not None:
            _set_or_delete(self._overloads, replica_id, overload.accepted(overloaded, now), NOT_OVERLOADED)

    def _refused(self, lease: Lease) -> None:
        replica_id = lease.replica.id
        before = self._overloads.get(replica_id, NOT_OVERLOADED)
        # A refusal while it had no other request of ours does not show how many it takes.
        others = self._registry.in_flight[replica_id] - 1 or inf
        retry_after_seconds = lease.retry_after_seconds
        self._overloads[replica_id] = overload.refused(before, self._clock(), retry_after_seconds, in_flight=others)

    def _is_ready(self, lease: Lease) -> bool:
        ready = self._registry.ready.get(lease.replica.variant, ())
        return any(replica.id == lease.replica.id for replica in ready)


def _set_or_delete(table: dict[str, T], replica_id: str, value: T, absent: T) -> None:
    if value is absent:
        del table[replica_id]
    else:
        table[replica_id] = value
