"""The latest decisions, each with the state that it was made on, and that state as a snapshot."""

import time
from collections import deque
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from math import inf, isfinite
from typing import Any

import msgspec

from config.schema import NO_FLOOR
from gateway.keys import Keys
from gateway.live_config import LiveConfig
from gateway.routing.breaker import Breaker
from gateway.routing.cluster_state import ClusterState
from gateway.routing.latency import LatencyEstimate
from gateway.routing.overload import Overload
from gateway.routing.pick import Decision
from gateway.routing.request import RoutingRequest
from gateway.routing.sessions import Placement
from gateway.routing.silence import Silence
from gateway.routing.snapshot import (
    AbsentReplica,
    CallerView,
    RequestView,
    Snapshot,
    TargetView,
    floor_limits,
    nested_gates,
    variant_views,
)
from gateway.routing.spill import RungKey, SpillGate
from serving.registry import Registry
from serving.replica import State

MAX_DECISIONS = 1000
NONE: Mapping[Any, Any] = {}


class DecisionRecord(msgspec.Struct, frozen=True, eq=False, gc=False):
    """One decision, with everything that it was made on; `decided_at` is on the monotonic clock.

    `estimates` are those of each of the request's rungs.
    """

    request: RoutingRequest
    decision: Decision
    decided_at: float
    wait_seconds: float
    estimates: tuple[tuple[LatencyEstimate, ...], ...]
    breakers: Mapping[str, Breaker]
    overloads: Mapping[str, Overload]
    gates: Mapping[RungKey, SpillGate]
    silent: Mapping[str, Silence] = NONE

    def snapshot(self, now: float) -> Snapshot:
        """The state as it was; `now` is on the same clock."""
        target = self.request.target
        excluded = [rejection.variant for rejection in target.excluded]
        names = [rung.name for rung in self.request.rungs]
        return Snapshot(
            recorded=datetime.fromtimestamp(time.time() - (now - self.decided_at), UTC),
            now_seconds=self.decided_at,
            variants=variant_views([*target.rungs, *excluded]),
            models={target.name: TargetView.of(target, 0.0)},
            estimates=dict(zip(names, self.estimates, strict=True)),
            breakers=dict(self.breakers),
            overloads=dict(self.overloads),
            gates=nested_gates(self.gates),
            silent=dict(self.silent),
            request=self._view(),
        )

    def _view(self) -> RequestView:
        request, candidate = self.request, self.decision.candidate
        chosen = None if candidate is None or candidate.exceeds(self.wait_seconds) else candidate.replica.id
        return RequestView(
            request.request_id,
            request.target.name,
            request.turn,
            request.prompt_tokens,
            request.answer_tokens,
            request.session,
            tuple([floor_limits(floor) for floor in request.floors if floor is not NO_FLOOR]),
            request.precisions,
            request.placement,
            dict(request.cached_tokens),
            request.tried,
            chosen,
            self.wait_seconds if isfinite(self.wait_seconds) else None,
            request.tools,
            request.session_hash,
        )


class DecisionLog:
    """Keeps the latest decisions, at most `limit`; a request may have several."""

    def __init__(self, limit: int = MAX_DECISIONS) -> None:
        self._records: deque[DecisionRecord] = deque(maxlen=limit)

    def append(
        self, request: RoutingRequest, cluster: ClusterState, decision: Decision, now: float, wait_seconds: float = inf
    ) -> None:
        """Keep a decision; what it was made on stays as it was."""
        estimates = cluster.estimates
        self._records.append(
            DecisionRecord(
                request,
                decision,
                now,
                wait_seconds,
                tuple([tuple(estimates(rung.name)) for rung in request.rungs]),
                dict(cluster.breakers) if cluster.breakers else NONE,
                dict(cluster.overloads) if cluster.overloads else NONE,
                _gates_of(request, cluster) if cluster.gates else NONE,
                dict(cluster.silent) if cluster.silent else NONE,
            )
        )

    def find(self, request_id: str) -> DecisionRecord | None:
        """The latest decision on a request; None if it is too long ago, or there was none."""
        return next((each for each in reversed(self._records) if each.request.request_id == request_id), None)


def snapshot_now(
    live_config: LiveConfig,
    cluster: ClusterState,
    placements: Mapping[str, Placement],
    registry: Registry,
    now: float,
) -> Snapshot:
    """The state of everything, to decide on requests of any model."""
    catalog, queue_seconds = live_config.catalog, live_config.limits.queue_seconds
    return Snapshot(
        recorded=datetime.now(UTC),
        now_seconds=now,
        variants=variant_views(catalog.variants.values()),
        models={name: TargetView.of(catalog.resolve(name), queue_seconds) for name in catalog.names()},
        estimates={name: tuple(cluster.estimates(name)) for name in catalog.variants},
        absent=tuple(_absent(registry)),
        breakers=dict(cluster.breakers),
        overloads=dict(cluster.overloads),
        gates=nested_gates(cluster.gates),
        silent=dict(cluster.silent),
        sessions=dict(placements),
        callers=_callers(live_config.keys),
    )


def _gates_of(request: RoutingRequest, cluster: ClusterState) -> Mapping[RungKey, SpillGate]:
    keys = [(request.target.name, rung.name) for rung in request.rungs]
    return {key: cluster.gates[key] for key in keys if key in cluster.gates}


def _absent(registry: Registry) -> Iterable[AbsentReplica]:
    for status in registry.snapshot():
        if status.state is not State.READY:
            for variant in sorted(status.replica.variants):
                yield AbsentReplica(status.replica.id, variant, status.state.value, status.reason)


def _callers(keys: Keys) -> dict[str, CallerView]:
    callers = [issued.caller for issued in (keys.issued or {}).values()]
    return {
        each.name: CallerView(each.aliases, floor_limits(each.floor), each.max_tokens) for each in callers if each.name
    }
