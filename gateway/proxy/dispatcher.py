"""Who gets which replica, and when: leases, and a line for those who wait.

The only owner of the retry budget and the waiting lines. Every change is one synchronous step: a slot that
becomes free goes to whoever's turn it is in the very step in which it does.
"""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import count
from math import inf
from types import TracebackType
from typing import Self

from config.schema import QueueSettings, RetrySettings
from config.variant import Variant
from gateway.errors import GatewayError, Overloaded, Unavailable
from gateway.observability.metrics import Metrics
from gateway.proxy.affinity import Affinity
from gateway.proxy.decision_log import DecisionLog
from gateway.proxy.leases import Demand, Lease, Ticket, Want, demand_for
from gateway.proxy.load.tracker import LoadTracker
from gateway.proxy.outliers import OutlierDetection
from gateway.proxy.spill import SpillState
from gateway.routing import breaker, retry, service_rate
from gateway.routing.catalog import Catalog
from gateway.routing.cluster_state import NOBODY, ClusterState, Query
from gateway.routing.engine_metrics import EngineMetrics
from gateway.routing.pick import Candidate, decide, has_room, long_enough, worth_waiting
from gateway.routing.queues import QueueLimits, Queues
from gateway.routing.request import needed_tokens
from serving.registry import Registry

ATTEMPTS = 3
USUAL_QUEUE, USUAL_RETRIES = QueueSettings(), RetrySettings()


class Dispatcher:
    """Gives out leases; use it as a context manager."""

    def __init__(
        self,
        registry: Registry,
        loads: LoadTracker,
        metrics: Metrics,
        queue: QueueSettings = USUAL_QUEUE,
        retries: RetrySettings = USUAL_RETRIES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry = registry
        self._loads = loads
        self._metrics = metrics
        self._clock = clock
        self._turns = count()
        self._health = OutlierDetection(registry, clock)
        self._spilling = SpillState(metrics)
        self._scene = ClusterState(loads.outlooks, self._health.breakers, self._health.marks, self._spilling.gates)
        self.memory = Affinity()
        self.decisions = DecisionLog()
        self._allowance = retry.RetryAllowance(round(retries.share * 1000), retries.burst * 1000)
        self._budget = retry.RetryBudget(self._allowance.most_thousandths)
        self._lines: Queues[Demand, Ticket] = Queues(QueueLimits(queue.per_alias, queue.in_all, queue.body_bytes))
        self._paces: dict[str, service_rate.ServiceRate] = {}
        self._alarm: asyncio.TimerHandle | None = None
        self._observing = registry.observed(self._look_again)

    def __enter__(self) -> Self:
        self._observing.__enter__()
        self._look_again()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._observing.__exit__(kind, error, trace)
        if self._alarm is not None:
            self._alarm.cancel()

    def breaker_states(self) -> Mapping[str, breaker.BreakerState]:
        """The breakers of replicas that have failed lately; all others are closed."""
        return self._health.states()

    @property
    def scene(self) -> ClusterState:
        """What decisions are made on; always true."""
        return self._scene

    def now(self) -> float:
        """The time that decisions go by."""
        return self._clock()

    def waiting(self) -> Mapping[str, int]:
        """How many requests wait, by alias."""
        return Counter(ticket.demand.alias for ticket in self._lines)

    def keep_only(self, catalog: Catalog) -> None:
        """Forget the gates of models that are no more, and what was learned of them."""
        ladders = {name: {rung.name for rung in catalog.resolve(name).rungs} for name in catalog.names()}
        self._spilling.keep_only(ladders)
        self.memory.keep_models(ladders)

    def busy(self, replica_id: str) -> bool:
        """Tell whether a replica is worth a closer look."""
        return self._loads.busy(replica_id)

    def polled(self, replica_id: str, asked_at: float, poll: EngineMetrics) -> None:
        """Take over what an engine says of its load."""
        self._loads.polled(replica_id, asked_at, poll)
        self.memory.holds(replica_id, poll.kv_capacity_tokens)
        if (variant := self._loads.variant_of(replica_id)) is not None:
            self._spilling.look(variant, self._loads.outlooks(variant), self._clock())

    def lost(self, replica_id: str) -> None:
        """Note that an engine wasn't to be asked."""
        self._loads.lost(replica_id)

    def arrived(self) -> int:
        """Count a request that wants an answer; gives it its turn among equals."""
        self._budget = retry.earned(self._budget, self._allowance)
        return next(self._turns)

    def has_choice(self, rungs: tuple[Variant, ...]) -> bool:
        """Tell whether more than one replica could answer."""
        ready = self._registry.ready
        return sum([len(ready.get(rung.name, ())) for rung in rungs]) > 1

    def why_not_again(self, deaths: int, attempts: int) -> retry.RetryRefusal | None:
        """Say why a request is not tried again; None allows it, if there is a replica for it."""
        return retry.why_not_again(deaths, attempts, self._budget, most_attempts=ATTEMPTS)

    def retried(self) -> None:
        """Take a retry that was allowed, and found a replica in the same step, from the budget."""
        self._budget = retry.spent(self._budget)

    async def lease(
        self,
        want: Want,
        *,
        wait_seconds: float,
        tried: frozenset[str] = NOBODY,
        failure: GatewayError | None = None,
    ) -> Lease:
        """Find a replica, and wait for one with room if there is none; `failure` is raised rather than waited for.

        Unavailable: none is there, or comes in time. Overloaded: the line is full, or didn't move in time, or every
        replica that may answer has so much to do that it wouldn't begin in time.
        """
        if not len(self._lines) or not self._lines.waiting(self._demand(want)):
            lease = self._taken(want, self.memory.query(want, tried), wait_seconds)
            if lease is not None:
                return lease
        if failure is not None:
            raise failure
        return await self._in_line(want, wait_seconds)

    def began(self, lease: Lease) -> None:
        """Note that a replica has read its prompt."""
        self._loads.began(lease.sent)

    def release(self, lease: Lease) -> None:
        """End a lease, and give its slot to whoever's turn it is."""
        self._health.ended(lease)
        self._registry.give_back(lease.choice.replica.id)
        self._loads.ended(lease.sent, lease.answer_tokens)
        self.memory.ended(lease.want, lease.prompt_tokens)
        if len(self._lines):
            self._pump()

    def succeeded(self, lease: Lease) -> None:
        """Hold nothing against a replica that answers."""
        self._health.succeeded(lease)
        if len(self._lines):
            name = lease.choice.variant.name
            self._paces[name] = service_rate.finished(self._paces.get(name), self._clock())

    def failed(self, lease: Lease) -> None:
        """Hold a failure against a replica."""
        self._health.failed(lease)

    def refused(self, lease: Lease, retry_after_seconds: float | None) -> None:
        """Spare a replica that has no room."""
        self._health.refused(lease, retry_after_seconds)

    def _taken(self, want: Want, query: Query, patience_seconds: float = inf) -> Lease | None:
        now = self._clock()
        decision = decide(want.target, want.rungs, query, self._scene, now)
        self.decisions.made(want, query, self._scene, decision, now, patience_seconds)
        if decision.gates:
            self._spilling.turn(want.target, decision.gates)
        offer = decision.offer
        if offer is None:
            return None
        if offer.comes_too_late(patience_seconds):
            raise _no_hope(want, offer, patience_seconds)
        return self._leased(want, query, offer, now)

    def _leased(self, want: Want, query: Query, offer: Candidate, now: float) -> Lease:
        replica_id = offer.outlook.id
        self._registry.take(replica_id)
        cached_tokens = query.cached_tokens.get(replica_id, 0.0)
        sent = self._loads.sent(offer.outlook, want.ask.prompt_tokens, cached_tokens, streams=want.streams)
        if moved := self.memory.went(want, query, offer.choice):
            self._metrics.session_moves.labels(want.target.name, moved).inc()
        return Lease(offer.choice, want, now, sent, self, probe_until=self._health.asked(replica_id, now))

    async def _in_line(self, want: Want, wait_seconds: float) -> Lease:
        demand = self._demand(want)
        if not self._hope(demand):
            raise Unavailable(f"no replica of {demand.alias!r} is ready")
        ticket = Ticket(demand, want, asyncio.get_running_loop().create_future())
        if not len(self._lines):
            self._resume_paces()
        pushed_out = self._lines.join(demand, want.key, ticket, self._clock() + wait_seconds, want.body_bytes)
        if pushed_out is None:
            raise self._full(demand, want.key)
        for other in pushed_out:
            other.refuse(self._full(other.demand, other.want.key))
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

    def _demand(self, want: Want) -> Demand:
        return demand_for(want, long_enough(want.rungs, self._scene, needed_tokens(want.ask)))

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
        return min(service_rate.retry_after_seconds(ahead, self._paces.get(name), now) for name in demand.names)

    def _pump(self) -> None:
        """Give free slots to those who wait, in turn, until nothing fits any more."""
        self._expire()
        while ticket := self._lines.next(self._serves):
            if not ticket.served.done():
                ticket.served.set_result(self._served(ticket.want))
        self._set_alarm()

    def _served(self, want: Want) -> Lease:
        """Answer whoever's turn it is; where only a replica with too short a context is left, that one says so."""
        lease = self._taken(want, self.memory.query(want)) or self._taken(want, Query(turn=want.turn))
        assert lease is not None, "nobody has room after all"
        return lease

    def _serves(self, demand: Demand) -> bool:
        return has_room(demand.target, demand.rungs, self._scene, self._clock(), demand.context_tokens)

    def _expire(self) -> None:
        for ticket in self._lines.expired(self._clock()):
            ticket.refuse(self._too_late(ticket.demand, ticket.want.key))

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
        self._paces = {name: service_rate.resumed(pace, now) for name, pace in self._paces.items()}

    def _look_again(self) -> None:
        """A replica came or went: nothing is held against one that isn't ready, it will be another one when it is."""
        ready = {replica.id for replicas in self._registry.ready.values() for replica in replicas}
        self._loads.keep(self._registry.ready)
        self._health.keep_only(ready)
        self.memory.keep_only(self._registry.ready)
        if len(self._lines):
            self._give_up_hopeless()
            self._pump()

    def _give_up_hopeless(self) -> None:
        """Tell those whose last replica has failed at once, instead of when their time is up."""
        hopeless = {demand for demand in {ticket.demand for ticket in self._lines} if not self._hope(demand)}
        for ticket in self._lines:
            if ticket.demand in hopeless:
                ticket.refuse(Unavailable(f"no replica of {ticket.demand.alias!r} is ready any more"))


def _no_hope(want: Want, offer: Candidate, patience_seconds: float) -> Overloaded:
    """Say when the fastest replica would be worth asking, if nobody else came."""
    wait_seconds = offer.outlook.work_seconds
    return Overloaded(
        f"every replica of {want.target.name!r} that may answer has {wait_seconds:.0f} s of work before this request, "
        f"which may wait for {patience_seconds:.0f} s; try again later",
        retry_after_seconds=service_rate.bounded(wait_seconds - patience_seconds),
        code="overloaded",
    )
