"""Puts recorded revisions of aliases in force: ladders into the live configuration, arms into the path of requests."""

import logging
import os
import secrets
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from gateway.deployment import Deployment
from gateway.http.cors import cors_for
from gateway.keys import Keys
from gateway.live_config import LiveConfig
from gateway.observability.metrics import Metrics
from gateway.proxy.shadow import Agreement, Scorer, Shadow
from gateway.rollout.arms import AliasArms, Counters, Rollouts
from gateway.rollout.controller import Driver, DriverContext
from gateway.rollout.follower import RolloutFollower
from gateway.rollout.lottery import Lottery
from gateway.rollout.metrics import RolloutCollector
from gateway.rollout.revision import AliasRevision, in_force, revisions_of, splits, use_of
from gateway.rollout.scaler import Scaler
from gateway.routing.cluster_state import ClusterState
from gateway.routing.target import Catalog
from gateway.validation import notices
from serving.probe import Probe
from serving.registry import Registry
from serving.replica import Replica
from serving.state.database import StateDatabase
from serving.state.link import Link
from serving.state.rollout_records import EMPTY, RolloutSnapshot

log = logging.getLogger(__name__)


class RecordedAliases:
    """The only writer of the live configuration: the configured one, with what rollouts have recorded."""

    def __init__(
        self,
        deployment: Deployment,
        live_config: LiveConfig,
        rollouts: Rollouts,
        cluster: ClusterState,
        counters: Counters,
    ) -> None:
        self.deployment = deployment  # as configured
        self.snapshot: RolloutSnapshot = EMPTY
        self._live_config = live_config
        self._rollouts = rollouts
        self.cluster = cluster
        self.scorer: ShadowScorer | None = None  # None: nothing is shadowed
        self._counters = counters

    @property
    def in_force(self) -> Deployment:
        """The configuration with what is recorded."""
        return self.with_recorded(self.deployment)

    def with_recorded(self, deployment: Deployment) -> Deployment:
        """Another configuration with what is recorded."""
        return in_force(deployment, self.snapshot)

    def configure(self, deployment: Deployment) -> None:
        """Use another configuration; recorded ladders stay, and so do the keys in force."""
        self.deployment = replace(deployment, keys=self._live_config.keys)
        log_notices(self.in_force)
        self._apply()

    def use_keys(self, keys: Keys) -> None:
        """Use other keys from the next request on; a later configuration does not change them."""
        self.deployment = replace(self.deployment, keys=keys)
        self._live_config.keys = keys

    def record(self, snapshot: RolloutSnapshot) -> None:
        """Use what is recorded now, from the next request on."""
        if snapshot == self.snapshot:
            return
        self.snapshot = snapshot
        self._apply()

    def _apply(self) -> None:
        deployment = self.in_force
        self._live_config.replace(live_config_of(deployment))
        catalog = self._live_config.catalog
        for alias, revision in revisions_of(self.snapshot).items():
            catalog.pin(alias, tuple(filter(None, (revision.new, revision.old))))
        before = {arms.rollout: arms for arms in (self._rollouts.active or {}).values()}
        active = {}
        for alias, (rollout, revision) in splits(deployment, self.snapshot).items():
            assert revision.canary is not None
            canary = catalog.canary(alias, revision.canary, revision.new)
            arms = before.get(rollout) or AliasArms(
                rollout, revision.old, canary, Lottery(rollout), self.cluster.estimates, self._counters
            )
            arms.use(canary, revision.weight, revision.step)
            self._use_shadow(arms, alias, revision)
            active[alias] = arms
        for rollout, arms in before.items():
            if all(each.rollout != rollout for each in active.values()) and arms.shadow is not None:
                arms.shadow.stop()
        self._rollouts.active = active or None

    def close(self) -> None:
        """Stop what runs for rollouts."""
        for arms in (self._rollouts.active or {}).values():
            if arms.shadow is not None:
                arms.shadow.stop()

    def _use_shadow(self, arms: AliasArms, alias: str, revision: AliasRevision) -> None:
        """Shadow a share of the alias' answers, from the revision that wants it to the end of the rollout."""
        arms.sampling.share = revision.shadow
        if not revision.shadow or arms.shadow is not None or self.scorer is None:
            return
        gates = self.cluster.gates
        arms.shadow = self.scorer.shadow(
            *(revision.new, revision.old),
            lambda: any(gate.spilling for (name, _), gate in gates.items() if name == alias),
            lambda result: arms.collection.shadowed(*result),
        )
        arms.shadow.start()


def live_config_of(deployment: Deployment) -> LiveConfig:
    """What requests go by under a configuration."""
    catalog = Catalog(deployment.settings.aliases, deployment.variants)
    settings = deployment.settings.gateway
    cors = cors_for(settings.cors.origins) if settings.cors else None
    domains = frozenset(settings.media_domains)
    return LiveConfig(catalog, deployment.keys, settings.limits, cors, domains, deployment.server_tls)


def log_notices(deployment: Deployment) -> None:
    """Log which aliases, rungs and variants have no effect."""
    for notice in notices(deployment):
        log.warning("%s", notice)


@dataclass(frozen=True, slots=True)
class ShadowScorer:
    """Makes shadows over the replicas of a registry."""

    registry: Registry
    scorer: Scorer

    def shadow(
        self, new: str, old: str, is_spilling: Callable[[], bool], report: Callable[[Agreement], None]
    ) -> Shadow:
        """Make a shadow of a new variant beside an old one."""

        def pair() -> tuple[Replica, Replica] | None:
            ready = self.registry.ready
            return (ready[new][0], ready[old][0]) if new in ready and old in ready else None

        def is_ready(replica: Replica) -> bool:
            return replica in self.registry.ready.get(replica.variant, ())

        return Shadow(self.scorer, pair, is_spilling, is_ready, report)


@dataclass(frozen=True, slots=True)
class RolloutService:
    """What follows rollouts in this process, and what drives them."""

    follower: RolloutFollower
    driver: Driver


@asynccontextmanager
async def shadowed(recorded: RecordedAliases, scorer: ShadowScorer) -> AsyncIterator[None]:
    """Let rollouts shadow answers while the block runs."""
    recorded.scorer = scorer
    try:
        yield
    finally:
        recorded.close()


@asynccontextmanager
async def followed_rollouts(
    state: str | None, recorded: RecordedAliases, rollouts: Rollouts, registry: Registry, metrics: Metrics
) -> AsyncIterator[RolloutService | None]:
    """Follow and drive the rollouts of a state database, if there is one; it is not created."""
    if state is None:
        metrics.registry.register(RolloutCollector())
        yield None
        return
    worker = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    scaler = Scaler(
        Link(StateDatabase.at(state, create=False)),
        lambda: recorded.deployment.wanted.cluster_access(),  # noqa: PLW0108 - a reload replaces the deployment
        lambda: recorded.deployment.settings.replicas,
        lambda: recorded.snapshot,
        lambda snapshot: use_of(recorded.deployment, snapshot),
        worker,
    )
    context = DriverContext(
        Link(StateDatabase.at(state, create=False)),
        registry,
        lambda: recorded.deployment,
        lambda: recorded.snapshot,
        lambda variant: sum(estimate.requests for estimate in recorded.cluster.estimates(variant)),
        worker,
        lambda alias, cause: metrics.rollout_rollbacks.labels(alias, cause).inc(),
        workload_problems=scaler.problems,
    )
    link = Link(StateDatabase.at(state, create=False))
    async with (
        Probe() as probe,
        shadowed(recorded, ShadowScorer(registry, probe)),
        RolloutFollower(link, rollouts, recorded.record, worker) as follower,
        scaler,
        Driver(context) as driver,
    ):
        metrics.registry.register(RolloutCollector(follower, driver))
        yield RolloutService(follower, driver)
