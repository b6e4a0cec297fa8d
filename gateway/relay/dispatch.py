"""Who gets which replica, and when: leases, a line for those who wait, and what is held against whom.

The only owner of the retry budget and the waiting lines. Every change is one synchronous step: a slot that becomes free
goes to whoever's turn it is in the very step in which it does.
"""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import count
from types import TracebackType
from typing import Self

from config.schema import QueueSettings, RetrySettings
from config.variant import Variant
from gateway.errors import GatewayError, Overloaded, Unavailable
from gateway.relay.health import Health
from gateway.relay.leases import Demand, Lease, Ticket, demand_for
from gateway.routing import breaker, budget, drain
from gateway.routing.catalog import Target
from gateway.routing.ladder import Scene, best, worth_waiting
from gateway.routing.lines import Bounds, Lines
from serving.registry import Registry

ATTEMPTS = 3
NOBODY: frozenset[str] = frozenset()
USUAL_QUEUE, USUAL_RETRIES = QueueSettings(), RetrySettings()


class Dispatch:
    """Gives out leases; use it as a context manager."""

    def __init__(
        self,
        registry: Registry,
        queue: QueueSettings = USUAL_QUEUE,
        retries: RetrySettings = USUAL_RETRIES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry = registry
        self._clock = clock
        self._turns = count()
        self._health = Health(registry, clock)
        self._scene = Scene(registry.ready, registry.in_flight, self._health.breakers, self._health.marks)
        self._allowance = budget.Allowance(round(retries.share * 1000), retries.burst * 1000)
        self._budget = budget.Budget(self._allowance.most_thousandths)
        self._lines: Lines[Demand, Ticket] = Lines(Bounds(queue.per_alias, queue.in_all, queue.body_bytes))
        self._paces: dict[str, drain.Pace] = {}
        self._alarm: asyncio.TimerHandle | None = None
        self._observing = registry.observed(self._look_again)

    def __enter__(self) -> Self:
        self._observing.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._observing.__exit__(kind, error, trace)
        if self._alarm is not None:
            self._alarm.cancel()

    def breaker_states(self) -> Mapping[str, breaker.State]:
        """The breakers of replicas that have failed lately; all others are closed."""
        return self._health.states()

    def waiting(self) -> Mapping[str, int]:
        """How many requests wait, by alias."""
        return Counter(ticket.demand.alias for ticket in self._lines)

    def arrived(self) -> int:
        """Count a request that wants an answer; gives it its turn among equals."""
        self._budget = budget.earned(self._budget, self._allowance)
        return next(self._turns)

    def why_not_again(self, deaths: int, attempts: int) -> budget.WhyNot | None:
        """Say why a request is not tried again; None allows it, if there is a replica for it."""
        return budget.why_not_again(deaths, attempts, self._budget, most_attempts=ATTEMPTS)

    def retried(self) -> None:
        """Take a retry that was allowed, and found a replica in the same step, from the budget."""
        self._budget = budget.spent(self._budget)

    async def lease(
        self,
        target: Target,
        rungs: tuple[Variant, ...],
        turn: int,
        *,
        key: str,
        body_bytes: int,
        wait_seconds: float,
        tried: frozenset[str] = NOBODY,
        failure: GatewayError | None = None,
    ) -> Lease:
        """Find a replica, and wait for one with room if there is none; `failure` is raised rather than waited for.

        Unavailable: none is there, or comes in time. Overloaded: the line is full, or didn't move in time.
        """
        if not len(self._lines) or not self._lines.waiting(demand_for(target, rungs)):
            lease = self._taken(target, rungs, turn, tried)
            if lease is not None:
                return lease
        if failure is not None:
            raise failure
        demand = demand_for(target, rungs)
        return await self._in_line(demand, turn, key, body_bytes, wait_seconds)

    def release(self, lease: Lease) -> None:
        """End a lease, and give its slot to whoever's turn it is."""
        self._health.ended(lease)
        self._registry.give_back(lease.choice.replica.id)
        if len(self._lines):
            self._pump()

    def succeeded(self, lease: Lease) -> None:
        """Hold nothing against a replica that answers."""
        self._health.succeeded(lease)
        if len(self._lines):
            name = lease.choice.variant.name
            self._paces[name] = drain.finished(self._paces.get(name), self._clock())

    def failed(self, lease: Lease) -> None:
        """Hold a failure against a replica."""
        self._health.failed(lease)

    def refused(self, lease: Lease, retry_after_seconds: float | None) -> None:
        """Spare a replica that has no room."""
        self._health.refused(lease, retry_after_seconds)

    def _taken(
        self, target: Target, rungs: tuple[Variant, ...], turn: int, tried: frozenset[str] = NOBODY
    ) -> Lease | None:
        now = self._clock()
        choice = best(target, rungs, self._scene, tried, turn, now)
        if choice is None:
            return None
        replica_id = choice.replica.id
        self._registry.take(replica_id)
        return Lease(choice, now, self, self._health.asked(replica_id, now))

    async def _in_line(self, demand: Demand, turn: int, key: str, body_bytes: int, wait_seconds: float) -> Lease:
        if not self._hope(demand):
            raise Unavailable(f"no replica of {demand.alias!r} is ready")
        ticket = Ticket(demand, key, turn, asyncio.get_running_loop().create_future())
        if not len(self._lines):
            self._resume_paces()
        pushed_out = self._lines.join(demand, key, ticket, self._clock() + wait_seconds, body_bytes)
        if pushed_out is None:
            raise self._full(demand, key)
        for other in pushed_out:
            other.refuse(self._full(other.demand, other.key))
        self._set_alarm()
        try:
            return await ticket.served
        except asyncio.CancelledError:
            with contextlib.suppress(GatewayError, asyncio.CancelledError):
                if ticket.served.done():
                    # It was its turn in the very moment in which its client left.
                    self.release(ticket.served.result())
            raise
        finally:
            self._lines.leave(ticket)

    def _hope(self, demand: Demand) -> bool:
        """Tell whether a replica that may answer is there, or on its way."""
        ready = self._registry.ready
        return any(rung.name in ready for rung in demand.rungs) or worth_waiting(
            demand.rungs, self._registry.snapshot()
        )

    def _full(self, demand: Demand, key: str) -> Overloaded:
        return Overloaded(
            f"too many requests wait for {demand.alias!r}; try again later",
            retry_after_seconds=self._retry_after(demand, key),
            code="queue_full",
        )

    def _retry_after(self, demand: Demand, key: str) -> float:
        now = self._clock()
        ahead = self._lines.ahead(demand, key)
        return min(drain.retry_after_seconds(ahead, self._paces.get(name), now) for name in demand.names)

    def _pump(self) -> None:
        """Give free slots to those who wait, in turn, until nothing fits any more."""
        self._expire()
        while ticket := self._lines.next(self._serves):
            lease = (
                None if ticket.served.done() else self._taken(ticket.demand.target, ticket.demand.rungs, ticket.turn)
            )
            if lease is not None:
                ticket.served.set_result(lease)
        self._set_alarm()

    def _serves(self, demand: Demand) -> bool:
        return best(demand.target, demand.rungs, self._scene, NOBODY, 0, self._clock()) is not None

    def _expire(self) -> None:
        for ticket in self._lines.expired(self._clock()):
            ticket.refuse(self._too_late(ticket.demand, ticket.key))

    def _set_alarm(self) -> None:
        """Look again when the next one gives up, or a full replica may have room again."""
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        soonest = self._lines.soonest_deadline()
        if soonest is None:
            return
        now = self._clock()
        delay_seconds = max(min([soonest, *self._health.changes_at(now)]) - now, 0.001)
        self._alarm = asyncio.get_running_loop().call_later(delay_seconds, self._ring)

    def _ring(self) -> None:
        self._alarm = None
        self._pump()

    def _too_late(self, demand: Demand, key: str) -> GatewayError:
        if any(name in self._registry.ready for name in demand.names):
            what = f"every replica of {demand.alias!r} is busy, and none had room in time; try again later"
            return Overloaded(what, retry_after_seconds=self._retry_after(demand, key), code="queue_timeout")
        return Unavailable(f"no replica of {demand.alias!r} got ready in time")

    def _resume_paces(self) -> None:
        now = self._clock()
        self._paces = {name: drain.resumed(pace, now) for name, pace in self._paces.items()}

    def _look_again(self) -> None:
        """A replica came or went: nothing is held against one that isn't ready, it will be another one when it is."""
        ready = {replica.id for replicas in self._registry.ready.values() for replica in replicas}
        self._health.keep_only(ready)
        if len(self._lines):
            self._give_up_hopeless()
            self._pump()

    def _give_up_hopeless(self) -> None:
        """Tell those whose last replica has failed at once, instead of when their time is up."""
        hopeless = {demand for demand in {ticket.demand for ticket in self._lines} if not self._hope(demand)}
        for ticket in self._lines:
            if ticket.demand in hopeless:
                ticket.refuse(Unavailable(f"no replica of {ticket.demand.alias!r} is ready any more"))
