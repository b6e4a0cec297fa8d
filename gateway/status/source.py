"""Reads the objects of a running gateway, and builds its status."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gateway.live_config import LiveConfig
from gateway.observability.metrics import Metrics
from gateway.observability.metrics.metrics import own_version
from gateway.proxy.dispatcher import Dispatcher
from gateway.rollout.arms import Rollouts
from gateway.routing.engine_metrics import PollResult
from gateway.routing.speed import SpeedProfile
from gateway.status.build import StatusFacts, status_of
from gateway.status.recent_errors import RecentErrors
from gateway.status.traffic import TrafficHistory
from gateway.status.values import GatewayStatus, Status, WorkerStatus
from serving.registry import Registry


@dataclass(frozen=True, slots=True)
class WorkerPlace:
    """Which of how many worker processes this is, counted from 1."""

    number: int = 1
    of: int = 1


@dataclass(slots=True, eq=False)
class StatusSource:
    """Everything that a status is read from; it changes none of it. `rollouts` are described by their owner."""

    registry: Registry
    live_config: LiveConfig
    dispatcher: Dispatcher
    metrics: Metrics
    traffic: TrafficHistory
    errors: RecentErrors
    arms: Rollouts
    polls: Callable[[], Mapping[str, PollResult]]
    speeds: Callable[[], Mapping[str, SpeedProfile]]
    rollouts: Callable[[], Sequence[dict[str, Any]]]
    state_away: Callable[[], str | None]
    kubernetes_away: Callable[[], str | None]
    draining: Callable[[], bool]
    place: WorkerPlace = WorkerPlace()
    min_seconds: float = 0.5
    version: str = field(default_factory=own_version)
    started_at: float = field(init=False)
    _read_at: float = field(default=float("-inf"), init=False)
    _json: bytes = field(default=b"", init=False)

    def __post_init__(self) -> None:
        self.started_at = self.traffic.wall_clock()

    def shared_json(self) -> bytes:
        """The status as JSON; readers within `min_seconds` share one, so many streams cost what one does."""
        now = self.dispatcher.now()
        if now - self._read_at >= self.min_seconds:
            self._json, self._read_at = self.read().to_json(), now
        return self._json

    def read(self) -> Status:
        """Build the status of this moment."""
        dispatcher, live_config = self.dispatcher, self.live_config
        return status_of(
            StatusFacts(
                gateway=self._gateway(),
                now=dispatcher.now(),
                catalog=live_config.catalog,
                cluster=dispatcher.cluster,
                replicas=self.registry.snapshot(),
                polls=self.polls(),
                breakers=dispatcher.breaker_states(),
                waiting=dispatcher.waiting(),
                speeds=self.speeds(),
                canaries={name: arms.canary for name, arms in (self.arms.active or {}).items()},
                history=self.traffic.history,
                recent=self.traffic.recent,
                rollouts=self.rollouts(),
                errors=self.errors.latest(),
            )
        )

    def _gateway(self) -> GatewayStatus:
        return GatewayStatus(
            version=self.version,
            started_at=self.started_at,
            now_at=self.traffic.wall_clock(),
            draining=self.draining(),
            worker=WorkerStatus(self.place.number, self.place.of, os.getpid()),
            in_flight=round(sum(gauge.value for gauge in self.metrics.in_flight.children.values())),
            keys_required=self.live_config.keys.issued is not None,
            state_database=self.state_away(),
            kubernetes=self.kubernetes_away(),
        )
