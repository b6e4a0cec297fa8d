"""The dispatcher leases replicas to requests, and queues the requests that have to wait.

It is the only owner of the queues and of the retry budget. Every change is one synchronous step: a slot that becomes
free is leased in the same step to the request that is next.

=================  ==========================================================  =======================================
a request is       event                                                       next
=================  ==========================================================  =======================================
new                a replica has room, and its queue is empty                  leased
new                the wait would exceed `wait_seconds`                        refused: 429
new                no replica is ready or starting                             refused: 503
new                no room, or others wait in its queue                        queued; beyond the key's share: 429
queued             a slot becomes free and it is its turn                      leased
queued             another key needs room in a full queue                      refused: 429 queue_full
queued             its time is up                                              refused: 429 queue_timeout, or 503
queued             the last replica that may answer is gone                    refused: 503
queued             its client leaves                                           gone; a lease of that moment is released
leased             its lease is released                                       ended; its slot is leased to the next
=================  ==========================================================  =======================================

Slots become free when a lease is released, when a replica becomes ready, and when the backoff of an overloaded replica
or the open time of a breaker ends: a timer (`_wake_up`) sees to the last, and to deadlines.
"""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import count
from math import inf
from types import TracebackType
from typing import Self

import msgspec

from config.schema import QueueSettings, RetrySettings
from config.variant import Variant
from gateway.errors import GatewayError, Overloaded, QueueFull, QueueTimeout, ToolsUnsupported, Unavailable
from gateway.observability.metrics import Metrics
from gateway.proxy.affinity import Affinity
from gateway.proxy.decision_log import DecisionLog
from gateway.proxy.leases import Lease, QueueKey, RegistryLedger, Waiter
from gateway.proxy.load.tracker import LoadTracker
from gateway.proxy.outliers import OutlierDetection
from gateway.proxy.retries import Retries
from gateway.proxy.silences import Exchanges, NoExchanges, SilenceDetection
from gateway.proxy.spill import SpillState
from gateway.routing import breaker, service_rate
from gateway.routing.cluster_state import ClusterState
from gateway.routing.engine_metrics import EngineMetrics
from gateway.routing.pick import (
    Candidate,
    decide,
)
from gateway.routing.queue import QueueLimits, Queues
from gateway.routing.request import NO_REPLICAS, NOTHING_CACHED, RoutingRequest
from gateway.routing.target import Catalog, Target
from gateway.routing.waiting import any_pending, has_room, none_takes_tools, shortest_fitting_context, unready_counts
from serving.registry import Registry

DEFAULT_QUEUE, DEFAULT_RETRIES = QueueSettings(), RetrySettings()
NO_EXCHANGES = NoExchanges()


class Dispatcher:
    """Leases replicas; a context manager."""

    def __init__(
        self,
        registry: Registry,
        load: LoadTracker,
        metrics: Metrics,
        queue: QueueSettings = DEFAULT_QUEUE,
        retries: RetrySettings = DEFAULT_RETRIES,
        clock: Callable[[], float] = time.monotonic,
        exchanges: Exchanges = NO_EXCHANGES,
    ) -> None:
        self._registry = registry
        self._load = load
        self._clock = clock
        self._turns = count()
        self._outliers = OutlierDetection(registry, clock)
        self._silences = SilenceDetection(registry, exchanges, clock, self._serve_queues)
        self._spill = SpillState(metrics)
        self.affinity = Affinity(metrics, clock)
        self.decisions = DecisionLog()
        self.cluster = ClusterState(
            load.estimates,
            self._outliers.breakers,
            self._outliers.overloads,
            self._spill.gates,
            self._silences.silent,
        )
        self._ledgers = (RegistryLedger(registry), load, self.affinity, self._outliers)
        self.retries = Retries(retries)
        self._queues: Queues[QueueKey, Waiter] = Queues(queue_limits(queue))
        self._rates: dict[str, service_rate.ServiceRate] = {}  # by rung, while requests wait
        self._timer: asyncio.TimerHandle | None = None
        self._observing = registry.observed(self._on_registry_change)

    def __enter__(self) -> Self:
        self._observing.__enter__()
        self._on_registry_change()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._observing.__exit__(kind, error, trace)
        self._silences.close()
        if self._timer is not None:
            self._timer.cancel()

    def __repr__(self) -> str:
        return f"<Dispatcher [{len(self._queues)} waiting, {self.retries}]>"

    # What requests ask for

    def next_turn(self) -> int:
        """Count a new request; its number rotates among equal replicas, and it earns a share of a retry."""
        self.retries.earn()
        return next(self._turns)

    def has_choice(self, rungs: Iterable[Variant]) -> bool:
        """Return whether more than one ready replica could answer."""
        ready = self._registry.ready
        count = 0
        for rung in rungs:
            count += len(ready.get(rung.name, ()))
            if count > 1:
                return True
        return False

    def require_tools(self, target: Target, rungs: Iterable[Variant]) -> None:
        """Raise ToolsUnsupported if every replica of some rungs, ready or starting, is known to take no tools."""
        names = [rung.name for rung in rungs]
        if not self._any_ready(names, tools=True) and none_takes_tools(names, self._registry.snapshot()):
            raise ToolsUnsupported(target.name)

    def spilled_lately_seconds(self, alias: str) -> float | None:
        """How long rungs of an alias have spilled, so that it matters where conversations begin; None: not lately."""
        return self._spill.spilled_lately_seconds(alias, self._clock)

    def try_lease(self, request: RoutingRequest, wait_seconds: float) -> Lease | None:
        """Lease a replica now; None if the request has to wait. Overloaded: it would wait longer than it may."""
        if len(self._queues) and self._queues.waiting(self._queue_key(request)):
            return None
        return self._decide(request, wait_seconds)

    async def wait(self, request: RoutingRequest, wait_seconds: float) -> Lease:
        """Wait in the queue for a replica.

        Unavailable: no replica is ready, or becomes ready in time. QueueFull, QueueTimeout: as they say.
        """
        key = self._queue_key(request)
        if not self._may_become_ready(key):
            raise Unavailable(f"no replica of {key.alias!r} is ready: {self._unready_counts(key)}")
        waiter = Waiter(key, request, asyncio.get_running_loop().create_future(), self._clock() + wait_seconds)
        if not len(self._queues):
            self._resume_rates()
        self._join(waiter)
        self._set_timer()
        try:
            return await waiter.result
        except asyncio.CancelledError:
            with contextlib.suppress(GatewayError, asyncio.CancelledError):
                if waiter.result.done():
                    # It got its lease in the very moment in which its client left.
                    waiter.result.result().release()
            raise
        finally:
            self._queues.leave(waiter)

    def was_suspect(self, lease: Lease) -> bool:
        """Whether a lease was of a replica that was known to fail."""
        return self._outliers.was_suspect(lease)

    def forgive(self, leases: Sequence[Lease]) -> None:
        """Hold the failures of a request, whose leases have ended, against no replica, nor against the budget."""
        for lease in leases:
            self._outliers.retract(lease)
        self.retries.refund(len(leases) - 1)
        if len(self._queues):
            self._serve_queues()

    # What polls say (gateway.proxy.load.polling.PollObserver)

    def busy(self, replica_id: str) -> bool:
        """Return whether a replica's load changes fast enough for frequent polls: not if other gateways poll it."""
        return self._load.busy(replica_id) and not self.affinity.shared

    def polled(self, replica_id: str, polled_at: float, poll: EngineMetrics) -> None:
        """Apply what an engine says of its load."""
        self._load.polled(replica_id, polled_at, poll)
        self.affinity.set_capacity(replica_id, poll.kv_capacity_tokens)
        for variant in self._load.variants_of(replica_id):
            self._spill.observe(variant, self._load.estimates(variant), self._clock())

    def poll_failed(self, replica_id: str) -> None:
        """Record that an engine did not answer a poll."""
        self._load.poll_failed(replica_id)

    def poll_answered(self, replica_id: str, answered: bool) -> None:
        """Record whether an engine has answered a poll at all, whatever it said."""
        if answered:
            self._silences.answered(replica_id)
        else:
            self._silences.unanswered(replica_id)

    # What operators see and change

    def set_limits(self, queue: QueueSettings, retries: RetrySettings) -> None:
        """Use other limits from the next request on; requests that wait stay."""
        self._queues.limits = queue_limits(queue)
        self.retries.set_limits(retries)

    def now(self) -> float:
        """The clock that decisions use."""
        return self._clock()

    def breaker_states(self) -> Mapping[str, breaker.BreakerState]:
        """The breakers of replicas that have failed lately; all others are closed."""
        return self._outliers.states()

    def waiting(self) -> Mapping[str, int]:
        """How many requests wait, by alias."""
        return Counter(waiter.queue.alias for waiter in self._queues)

    def keep_only(self, catalog: Catalog) -> None:
        """Forget gates and token lengths of models that are not in a catalog."""
        ladders = {name: {rung.name for rung in catalog.resolve(name).rungs} for name in catalog.names()}
        self._spill.keep_only(ladders)
        self.affinity.keep_models(ladders)

    # Deciding

    def _decide(self, request: RoutingRequest, wait_seconds: float = inf) -> Lease | None:
        now = self._clock()
        decision = decide(request, self.cluster, now)
        self.decisions.append(request, self.cluster, decision, now, wait_seconds)
        if decision.gates:
            self._spill.apply(request.target, decision.gates)
        candidate = decision.candidate
        if candidate is None:
            return None
        if candidate.exceeds(wait_seconds):
            raise _too_long(request, candidate, wait_seconds)
        return Lease(candidate, request, now, self._ledgers, self._on_release).acquire()

    def _on_release(self, lease: Lease) -> None:
        if not len(self._queues):
            return
        if lease.outcome == "succeeded":
            name = lease.replica.variant
            self._rates[name] = service_rate.finished(self._rates.get(name), self._clock())
        self._serve_queues()

    # The queues

    def _queue_key(self, request: RoutingRequest) -> QueueKey:
        context_tokens = shortest_fitting_context(request.rungs, self.cluster, request.needed_tokens, request.tools)
        names = tuple([rung.name for rung in request.rungs])
        return QueueKey(request.target.name, names, context_tokens, request.tools)

    def _join(self, waiter: Waiter) -> None:
        """Queue a request, which may evict others of keys that hold more than their share; or refuse it."""
        request = waiter.request
        evicted = self._queues.join(waiter.queue, request.key, waiter, waiter.deadline, request.body_bytes)
        for other in [waiter] if evicted is None else evicted:
            other.refuse(self._queue_full(other.queue, other.request.key))

    def _serve_queues(self) -> None:
        """Lease free slots to waiting requests, in turn, until nothing fits any more."""
        for waiter in self._queues.expired(self._clock()):
            waiter.refuse(self._queue_timeout(waiter.queue, waiter.request.key))
        while (turn := self._queues.next(self._serves)) is not None:
            if turn.result.done():
                continue
            lease = self._lease_next(turn.request)
            assert lease is not None, "a queue is served only while a replica has room for its requests"
            turn.result.set_result(lease)
        self._set_timer()

    def _serves(self, key: QueueKey) -> bool:
        return has_room(key.variants, self.cluster, self._clock(), key.context_tokens, key.tools)

    def _lease_next(self, request: RoutingRequest) -> Lease | None:
        # A queue does not know which replicas a request has tried: any of them may answer after a wait.
        request = self.affinity.refreshed(request, NO_REPLICAS)
        lease = self._decide(request)
        if lease is not None:
            return lease
        # Only a context that is too short is left: its engine's error says so.
        return self._decide(
            msgspec.structs.replace(
                request, prompt_tokens=0.0, answer_tokens=None, placement=None, cached_tokens=NOTHING_CACHED
            )
        )

    def _set_timer(self) -> None:
        """Wake up when the next deadline passes, or when a barred or overloaded replica may be asked again."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        deadline = self._queues.soonest_deadline()
        if deadline is None:
            return
        now = self._clock()
        delay_seconds = max(min([deadline, *self._outliers.changes_at(now)]) - now, 0.001)
        self._timer = asyncio.get_running_loop().call_later(delay_seconds, self._wake_up)

    def _wake_up(self) -> None:
        self._timer = None
        self._serve_queues()

    def _resume_rates(self) -> None:
        now = self._clock()
        self._rates = {name: service_rate.resumed(rate, now) for name, rate in self._rates.items()}

    def _on_registry_change(self) -> None:
        ready = self._registry.ready
        self._load.keep_only(ready)
        self._silences.follow_registry()
        self._outliers.keep_only({replica.id for replicas in ready.values() for replica in replicas})
        self.affinity.keep_only(ready)
        if len(self._queues):
            self._refuse_hopeless()
            self._serve_queues()

    def _refuse_hopeless(self) -> None:
        """Refuse requests whose last replica has failed at once, instead of when their time is up."""
        hopeless = {key for key in {waiter.queue for waiter in self._queues} if not self._may_become_ready(key)}
        for waiter in self._queues:
            if waiter.queue in hopeless:
                what = f"no replica of {waiter.queue.alias!r} is ready any more: {self._unready_counts(waiter.queue)}"
                waiter.refuse(Unavailable(what))

    def _may_become_ready(self, key: QueueKey) -> bool:
        return self._any_ready(key.variants, key.tools) or any_pending(key.variants, self._registry.snapshot())

    def _any_ready(self, names: Iterable[str], tools: bool) -> bool:
        ready = self._registry.ready
        if tools:
            return any(replica.tools is not False for name in names for replica in ready.get(name, ()))
        return any(name in ready for name in names)

    # Refusals

    def _queue_full(self, key: QueueKey, api_key: str) -> QueueFull:
        what = f"too many requests wait for {key.alias!r}; try again later"
        return QueueFull(what, retry_after_seconds=self._retry_after(key, api_key))

    def _queue_timeout(self, key: QueueKey, api_key: str) -> GatewayError:
        if self._any_ready(key.variants, key.tools):
            what = f"every replica of {key.alias!r} is busy, and none had room in time; try again later"
            return QueueTimeout(what, retry_after_seconds=self._retry_after(key, api_key))
        what = f"no replica of {key.alias!r} became ready in time: {self._unready_counts(key)}; try again later"
        return Unavailable(what)

    def _unready_counts(self, key: QueueKey) -> str:
        return unready_counts(key.variants, self._registry.snapshot())

    def _retry_after(self, key: QueueKey, api_key: str) -> float:
        now, ahead = self._clock(), self._queues.ahead(key, api_key)
        rates = [self._rates.get(name) for name in key.variants]
        return min([service_rate.retry_after_seconds(ahead, rate, now) for rate in rates])


def queue_limits(settings: QueueSettings) -> QueueLimits:
    """Return the limits of the queues as configured."""
    return QueueLimits(settings.per_alias, settings.in_all, settings.body_bytes)


def _too_long(request: RoutingRequest, candidate: Candidate, wait_seconds: float) -> Overloaded:
    """Refuse with the time after which the fastest replica would be worth asking, if no other request came."""
    work_seconds = candidate.replica.work_seconds
    return Overloaded(
        f"every replica of {request.target.name!r} that may answer has {work_seconds:.0f} s of work before this "
        f"request, which may wait {wait_seconds:.0f} s; try again later",
        retry_after_seconds=service_rate.bounded(work_seconds - wait_seconds),
    )
