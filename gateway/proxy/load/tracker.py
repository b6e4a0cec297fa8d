"""The load of every ready replica, and the latency estimates made of it.

The only owner of both; the formulas are gateway.routing's, and counts of requests in flight the registry's.
"""

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from gateway.proxy.leases import Lease
from gateway.proxy.load.replica_load import InFlight, ReplicaLoad, SharedEstimate
from gateway.routing.engine_metrics import EngineMetrics
from gateway.routing.latency import LatencyEstimate, ReplicaMetrics, estimate_latency
from gateway.routing.speed import DEFAULT_ANSWER_TOKENS, SpeedProfile
from serving.replica import Replica

UNMEASURED: Mapping[str, SpeedProfile] = {}
# Each answer is a fiftieth of a variant's mean answer length; a measurement's mix counts as so many answers.
LENGTH_SHARE = 0.02
MIX_ANSWERS = 10


@dataclass(slots=True, eq=False)
class _VariantLoad:
    """The ready replicas of one variant, with their estimates in the same order."""

    variant: str
    shared: SharedEstimate
    answer_tokens: float
    answers: int  # that this is the mean of
    loads: list[ReplicaLoad] = field(default_factory=list)
    estimates: tuple[LatencyEstimate, ...] = ()
    outdated: dict[ReplicaLoad, int] = field(default_factory=dict)  # with their places

    def mean_others(self) -> float:
        """How many requests of others the replicas have whose polls are recent."""
        others = [load.others for load in self.loads if not load.stale]
        return sum(others) / len(others) if others else 0.0

    def add_answer(self, answer_tokens: int) -> None:
        self.answers += 1
        self.answer_tokens += max(1 / self.answers, LENGTH_SHARE) * (answer_tokens - self.answer_tokens)


@dataclass(frozen=True, slots=True)
class _AdapterReplicas:
    """The ready replicas of one variant that serve one of its LoRA adapters: their load is that of the variant."""

    base: str
    replica_ids: frozenset[str]


class LoadTracker:
    """Tracks the load of ready replicas; `in_flight` (by replica) and `speeds` (by variant) have other owners."""

    def __init__(
        self,
        in_flight: Mapping[str, int],
        speeds: Mapping[str, SpeedProfile] = UNMEASURED,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._in_flight = in_flight
        self._speeds = speeds
        self._clock = clock
        self._loads: dict[str, ReplicaLoad] = {}  # by replica
        self._variants: dict[str, _VariantLoad] = {}
        self._adapters: dict[str, _AdapterReplicas] = {}  # by the variant that the adapter is

    def variants_of(self, replica_id: str) -> Collection[str]:
        """The variants that a ready replica answers; none if it is not ready."""
        load = self._loads.get(replica_id)
        return () if load is None else load.replica.variants

    def estimates(self, variant: str) -> tuple[LatencyEstimate, ...]:
        """The latency estimates of a variant's ready replicas, up to date; the tuple does not change later."""
        group = self._variants.get(variant)
        if group is None:
            return self._adapter_estimates(variant)
        if group.outdated:
            self._renew(group)
        return group.estimates

    def replica_metrics(self, variant: str) -> list[ReplicaMetrics]:
        """What is known of a variant's ready replicas."""
        group = self._variants.get(variant)
        if group is None:
            return []
        mean_others = group.mean_others()
        return [self._metrics(load, group, mean_others) for load in group.loads]

    def keep_only(self, ready: Mapping[str, tuple[Replica, ...]]) -> None:
        """Follow the registry; a replica that differs from the one before starts anew."""
        known, groups = self._loads, {}
        self._loads, self._adapters = {}, {}
        for variant, replicas in ready.items():
            if (base := replicas[0].base) is not None:
                self._adapters[variant] = _AdapterReplicas(base, frozenset([replica.id for replica in replicas]))
                continue
            group = groups[variant] = self._group(variant)
            for place, replica in enumerate(replicas):
                load = known.get(replica.id)
                if load is None or load.replica != replica:
                    load = ReplicaLoad(replica, group.shared, self._clock, group.outdated, place)
                load.outdated, load.place = group.outdated, place
                group.loads.append(load)
                group.outdated[load] = place
                self._loads[replica.id] = load
        self._variants = groups

    @property
    def speeds(self) -> Mapping[str, SpeedProfile]:
        """The measured speeds, by variant."""
        return self._speeds

    def set_speeds(self, speeds: Mapping[str, SpeedProfile]) -> None:
        """Use other measurements."""
        self._speeds = speeds
        for load in self._loads.values():
            load.outdated[load] = load.place

    def send(self, latency: LatencyEstimate, prompt_tokens: float, cached_tokens: float, *, streams: bool) -> InFlight:
        """Count a request in, in the step in which the registry does."""
        return self._loads[latency.id].send(latency, max(prompt_tokens - cached_tokens, 0.0), streams)

    def end(self, request: InFlight, answer_tokens: int | None) -> None:
        """Count a request out, in the step in which the registry does; None: the length of its answer is unknown."""
        if request.ended:
            return
        load, now = request.load, self._clock()
        load.end(request, now)
        replica = load.replica
        current = self._loads.get(replica.id)
        if current is not load:
            # The replica has left. If it came back, the registry counts this request at its successor.
            if current is not None:
                current.outdated[current] = current.place
            return
        if answer_tokens is not None and answer_tokens > 0:
            self._variants[replica.variant].add_answer(answer_tokens)
            if load.stale and request.first_token_at is not None:
                speed, concurrency = self._speeds.get(replica.variant), len(load.in_flight) + 1
                load.learn_from_answer(concurrency, answer_tokens - 1, now - request.first_token_at, speed)

    def enter(self, lease: Lease) -> None:
        """Count the request of a lease in (Ledger)."""
        request, latency = lease.request, lease.candidate.replica
        tokens = request.prompt_tokens - request.cached_tokens.get(latency.id, 0.0)
        lease.in_flight = self._loads[latency.id].send(latency, tokens if tokens > 0 else 0.0, request.streams)

    def leave(self, lease: Lease) -> None:
        """Count it out."""
        self.end(lease.in_flight, lease.answer_tokens)

    def busy(self, replica_id: str) -> bool:
        """Return whether a replica's load changes fast enough for frequent polls."""
        return self._in_flight.get(replica_id, 0) > 0

    def polled(self, replica_id: str, polled_at: float, poll: EngineMetrics) -> None:
        """Apply a poll that was sent at `polled_at`; one that does not tell the load is ignored."""
        load = self._loads.get(replica_id)
        if load is None or not poll.tells_load:
            return
        group = self._variants[load.replica.variant]
        load.update(poll, polled_at, self._in_flight.get(replica_id, 0), self._speeds.get(group.variant))
        # What is assumed of silent siblings depends on it.
        group.outdated.update({each: place for place, each in enumerate(group.loads) if each.stale})

    def poll_failed(self, replica_id: str) -> None:
        """Record that a poll failed: the last one stays valid for a while."""
        load = self._loads.get(replica_id)
        if load is not None:
            load.poll_failed(self._in_flight.get(replica_id, 0))

    def _group(self, variant: str) -> _VariantLoad:
        before, speed = self._variants.get(variant), self._speeds.get(variant)
        if before is not None:
            return _VariantLoad(variant, before.shared, before.answer_tokens, before.answers)
        if speed is not None:
            return _VariantLoad(variant, SharedEstimate(), speed.answer_tokens, MIX_ANSWERS)
        return _VariantLoad(variant, SharedEstimate(), DEFAULT_ANSWER_TOKENS, 0)

    def _adapter_estimates(self, variant: str) -> tuple[LatencyEstimate, ...]:
        adapter = self._adapters.get(variant)
        if adapter is None:
            return ()
        return tuple([each for each in self.estimates(adapter.base) if each.id in adapter.replica_ids])

    def _renew(self, group: _VariantLoad) -> None:
        """Estimate anew what is out of date, in a new tuple: the decision log keeps the one of each decision."""
        outdated = group.outdated
        estimates: list[Any] = list(group.estimates or group.loads)
        mean_others = -1.0
        for load, place in outdated.items():
            if load.stale and mean_others < 0:
                mean_others = group.mean_others()
            estimates[place] = estimate_latency(self._metrics(load, group, mean_others))
        group.estimates = tuple(estimates)
        outdated.clear()

    def _metrics(self, load: ReplicaLoad, group: _VariantLoad, mean_others: float) -> ReplicaMetrics:
        others, unread, sent = load.others, load.unread_tokens, load.sent_tokens
        return ReplicaMetrics(
            load.replica,
            self._in_flight.get(load.replica.id, 0),
            # Silence is not taken for idleness.
            mean_others if load.stale and mean_others > others else others,
            unread if unread > 0 else 0.0,
            sent if sent > 0 else 0.0,
            load.sent_requests,
            load.poll,
            load.stale,
            load.observed_slots,
            load.slowdown,
            self._speeds.get(group.variant) or load.estimate.speed(group.answer_tokens),
            group.answer_tokens,
            load.hash,
        )
