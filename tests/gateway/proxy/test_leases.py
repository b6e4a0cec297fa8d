"""Leases: which ledgers they enter and leave, in which order, and what happens if a ledger raises."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product

import pytest

from gateway.errors import Overloaded, QueueFull
from gateway.observability.metrics import Metrics
from gateway.proxy.affinity import Affinity
from gateway.proxy.leases import Lease, Ledger, QueueKey, RegistryLedger, Waiter
from gateway.proxy.load.tracker import LoadTracker
from gateway.proxy.outliers import OutlierDetection
from gateway.proxy.stats import RequestStats
from gateway.routing.pick import Candidate
from gateway.routing.request import RoutingRequest
from gateway.routing.speed import SpeedProfile
from serving.errors import NoSuchReplica
from serving.registry import Registry
from serving.replica import State
from tests.gateway.proxy.contexts import HI, REPLICA, SMOL, ignore
from tests.gateway.proxy.dispatching import end, running_dispatcher, settle

NAMES = ("registry", "load", "affinity", "outliers")
SPEED = SpeedProfile((0.025,), (40.0,), 0.001, 64)


class LedgerError(Exception):
    """An error of a ledger."""


@dataclass
class RecordingLedger:
    """Keeps what it is called with, in `calls`; raises after that, if the test says so."""

    name: str
    calls: list[str]
    raises_in: frozenset[str] = frozenset()

    def enter(self, lease: Lease) -> None:
        """Record an entry; what raises has not entered."""
        self._call("enter")

    def leave(self, lease: Lease) -> None:
        """Record a leave."""
        self._call("leave")

    def _call(self, method: str) -> None:
        self.calls.append(f"{method} {self.name}")
        if method in self.raises_in:
            raise LedgerError(self.name)


@dataclass
class Owners:
    """The real ledgers of one replica, REPLICA, which is ready, and a clock that does not move."""

    registry: Registry = field(default_factory=Registry)
    released: list[Lease] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.registry.put(REPLICA, State.READY)
        self.load = LoadTracker(self.registry.in_flight, {"hi": SPEED}, lambda: 0.0)
        self.affinity = Affinity(Metrics())
        self.outliers = OutlierDetection(self.registry, lambda: 0.0)
        self.load.keep_only(self.registry.ready)
        self.affinity.keep_only(self.registry.ready)

    @property
    def ledgers(self) -> tuple[Ledger, ...]:
        """All of them, in the dispatcher's order."""
        return RegistryLedger(self.registry), self.load, self.affinity, self.outliers

    def lease(self) -> Lease:
        """A lease that has not entered any ledger."""
        candidate = Candidate(self.load.estimates("hi")[0], HI, "preferred")
        request = RoutingRequest(SMOL, SMOL.rungs, prompt_tokens=100.0, session="s", blocks=(1, 2))
        return Lease(candidate, request, 0.0, self.ledgers, self.released.append)

    def counts(self) -> tuple[int, float, int]:
        """Requests by the registry, unread tokens by the load, and turns by the affinity."""
        placement = self.affinity.placement("s")
        unread_tokens = sum(each.unread_tokens for each in self.load.replica_metrics("hi"))
        return self.registry.in_flight.get("hi-1", 0), unread_tokens, placement.running if placement else 0


def lease_of(*ledgers: Ledger, on_release: Callable[[Lease], None] = lambda _: None) -> Lease:
    """A lease with these ledgers."""
    return Lease(Owners().lease().candidate, RoutingRequest(SMOL, SMOL.rungs), 0.0, ledgers, on_release)


def recording(calls: list[str], raises_in: dict[str, frozenset[str]] | None = None) -> list[RecordingLedger]:
    """One recording ledger of each name; `raises_in` has the methods that raise, by name."""
    return [RecordingLedger(name, calls, (raises_in or {}).get(name, frozenset())) for name in NAMES]


# The order


def test_ledgers_are_left_in_reverse_order() -> None:
    """A lease enters the first ledger first and leaves it last; then `on_release` is called once."""
    calls: list[str] = []
    with lease_of(*recording(calls), on_release=lambda _: calls.append("on_release")).acquire():
        assert calls == [f"enter {name}" for name in NAMES]
        calls.clear()
    assert calls == [*(f"leave {name}" for name in reversed(NAMES)), "on_release"]


async def test_the_order_of_the_dispatcher() -> None:
    """Its leases enter registry, load, affinity and outliers, in this order."""
    async with running_dispatcher() as harness:
        harness.add()
        lease = await harness.lease_now()
        assert [type(ledger) for ledger in lease._ledgers] == [
            RegistryLedger,
            LoadTracker,
            Affinity,
            OutlierDetection,
        ]
        end(lease)


def test_what_each_ledger_counts() -> None:
    """A lease is counted by every ledger from `acquire` to the end of its block."""
    owners = Owners()
    with owners.lease().acquire() as lease:
        assert lease.replica is REPLICA
        assert owners.counts() == (1, 100.0, 1)
        assert owners.affinity.blocks_held == 2
        lease.failed()
        assert not owners.outliers.breakers, "the outcome counts when the lease ends"
    assert owners.counts() == (0, 0.0, 0)
    assert set(owners.outliers.breakers) == {"hi-1"}
    assert owners.released == [lease]


def test_an_error_in_the_block() -> None:
    """It is raised, and every ledger is left."""
    owners = Owners()
    with pytest.raises(ZeroDivisionError), owners.lease().acquire():
        _ = 1 / 0
    assert owners.counts() == (0, 0.0, 0)
    assert len(owners.released) == 1


# Errors of ledgers


@pytest.mark.parametrize("place", range(len(NAMES)))
def test_an_error_in_enter(place: int) -> None:
    """The ledgers that were entered are left in reverse; the others are not, and the lease is not released."""
    calls: list[str] = []
    ledgers = recording(calls, {NAMES[place]: frozenset({"enter"})})
    lease = lease_of(*ledgers, on_release=lambda _: calls.append("on_release"))
    with pytest.raises(LedgerError, match=NAMES[place]):
        lease.acquire()
    entered = NAMES[:place]
    assert calls == [*(f"enter {name}" for name in NAMES[: place + 1]), *(f"leave {name}" for name in entered[::-1])]
    calls.clear()
    lease.release()
    assert calls == []


@pytest.mark.parametrize("raising", [*product([False, True], repeat=len(NAMES))], ids=str)
def test_errors_in_leave(raising: tuple[bool, ...]) -> None:
    """Every ledger is left, whichever of them raise; `on_release` is called, and the error is raised."""
    calls: list[str] = []
    raises_in = {name: frozenset({"leave"}) for name, raises in zip(NAMES, raising, strict=True) if raises}
    lease = lease_of(*recording(calls, raises_in), on_release=lambda _: calls.append("on_release")).acquire()
    calls.clear()
    if any(raising):
        with pytest.raises(LedgerError):
            lease.release()
    else:
        lease.release()
    expected = [*(f"leave {name}" for name in reversed(NAMES)), "on_release"]
    assert calls == expected
    lease.release()
    assert calls == expected


@pytest.mark.parametrize("raises_in_leave", NAMES[:3])
def test_an_error_in_enter_and_another_in_leave(raises_in_leave: str) -> None:
    """All ledgers that were entered are left all the same."""
    calls: list[str] = []
    raises_in = {"outliers": frozenset({"enter"}), raises_in_leave: frozenset({"leave"})}
    with pytest.raises(LedgerError, match=raises_in_leave):
        lease_of(*recording(calls, raises_in)).acquire()
    assert calls[4:] == ["leave affinity", "leave load", "leave registry"]


def test_a_replica_that_left_before_the_lease() -> None:
    """The registry refuses it, and nothing is counted."""
    owners = Owners()
    lease = owners.lease()
    owners.registry.remove("hi-1")
    with pytest.raises(NoSuchReplica):
        lease.acquire()
    assert owners.counts() == (0, 0.0, 0)


def test_a_replica_whose_load_is_not_tracked() -> None:
    """The registry's count is taken back."""
    owners = Owners()
    lease = owners.lease()
    owners.load.keep_only({})
    with pytest.raises(KeyError):
        lease.acquire()
    assert owners.counts() == (0, 0.0, 0)


# Release


def test_a_second_release_does_nothing() -> None:
    """Counts, outcomes and the owner see one release."""
    owners = Owners()
    leases = [owners.lease().acquire() for _ in range(3)]
    for lease in leases[:2]:
        lease.failed()
        lease.release()
        lease.release()
    assert owners.counts() == (1, 100.0, 1)
    assert owners.released == leases[:2]
    assert owners.outliers.states() == {"hi-1": "closed"}, "two failures, and not four: three open a breaker"
    leases[2].failed()
    leases[2].release()
    assert owners.outliers.states() == {"hi-1": "open"}


async def test_a_slot_is_given_away_once() -> None:
    """A second release of a lease does not free the slot of the lease that followed it."""
    async with running_dispatcher() as harness:
        harness.add()
        first = await harness.lease_now()
        second, third = await harness.start_many(2)
        first.release()
        first.release()
        await settle()
        assert (second.done(), third.done()) == (True, False)
        assert harness.in_flight() == {"hi-0": 1}
        end(second.result())
        await settle()
        end(third.result())


# The first token


async def test_the_first_token_reaches_the_load() -> None:
    """The statistics call the load directly: the prompt counts as read, and a second token changes nothing."""
    async with running_dispatcher(speeds={"hi": SPEED}) as harness:
        harness.add(max_in_flight=9)
        tasks = [harness.start(prompt_tokens=100.0) for _ in range(2)]
        await settle()
        lease, other = (task.result() for task in tasks)

        def unread_tokens() -> float:
            return harness.load.replica_metrics("hi")[0].unread_tokens

        with lease, RequestStats(harness.metrics, ignore, "completions", "r-1", lambda: harness.now[0]) as stats:
            assert unread_tokens() == 200.0
            stats.attempt(lease.candidate, lease.in_flight.first_token)
            harness.now[0] = 0.3
            stats.token()
            assert unread_tokens() == 100.0
            assert lease.in_flight.first_token_at == 0.3
            harness.now[0] = 0.4
            stats.token()
            assert (unread_tokens(), lease.in_flight.first_token_at) == (100.0, 0.3)
        end(other)


async def test_a_first_token_after_the_release() -> None:
    """It is ignored."""
    async with running_dispatcher(speeds={"hi": SPEED}) as harness:
        harness.add()
        lease = await harness.lease_now()
        end(lease)
        estimate = harness.load.estimates("hi")
        lease.in_flight.first_token()
        assert harness.load.estimates("hi") is estimate


# Waiters


async def test_a_waiter_is_refused_once() -> None:
    """An error for a waiter that has one already, or whose client has left, is dropped."""
    request = RoutingRequest(SMOL, SMOL.rungs)
    key, loop = QueueKey("smol", ("hi", "lo"), 0.0), asyncio.get_running_loop()
    waiter, cancelled = (Waiter(key, request, loop.create_future(), 1.0) for _ in range(2))
    first = QueueFull("first", retry_after_seconds=1)
    waiter.refuse(first)
    waiter.refuse(Overloaded("second", retry_after_seconds=1))
    assert waiter.result.exception() is first
    cancelled.result.cancel()
    cancelled.refuse(first)
    assert cancelled.result.cancelled()
