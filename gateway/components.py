"""The components of a gateway, each with what it owns and ends; `gateway.app` puts them together."""

from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO

from fastapi import FastAPI
from prometheus_client.registry import Collector

from config.schema import GatewaySettings, Settings
from gateway.deployment import Deployment
from gateway.handlers.admin import AdminContext, admin_app
from gateway.handlers.inference import InferenceHandler, Observers
from gateway.handlers.models import client_app
from gateway.handlers.router import Router
from gateway.http.hosts import allowed_hosts
from gateway.keys import Keys
from gateway.keys.follower import followed_keys
from gateway.live_config import LiveConfig
from gateway.observability.access_log import AccessLog, both
from gateway.observability.metrics import FleetCollector, LoopLag, Metrics
from gateway.observability.tracing import tracing
from gateway.observability.usage import UsageRecorder, recorded_usage
from gateway.openai.endpoints import ENDPOINTS
from gateway.proxy.collectors import EngineCollector, LadderCollector
from gateway.proxy.dispatcher import Dispatcher
from gateway.proxy.exchange import Proxy
from gateway.proxy.external_models import ExternalModels, external_ladders, external_model_replicas
from gateway.proxy.initial_series import create_series
from gateway.proxy.load.poll_share import PollShare
from gateway.proxy.load.polling import MetricsPoller, intervals_of
from gateway.proxy.load.tracker import LoadTracker
from gateway.proxy.upstream.by_kind import UpstreamByKind
from gateway.proxy.upstream.external import ExternalUpstream, load_litellm
from gateway.proxy.upstream.external_parameters import ParameterTable
from gateway.proxy.upstream.pool import Pool
from gateway.proxy.upstream.vllm import VllmUpstream
from gateway.quota import Quota
from gateway.quota_leases import CALL_SECONDS, QuotaLeases
from gateway.rollout.administration import RolloutAdministration
from gateway.rollout.arms import Rollouts
from gateway.rollout.recorded import RecordedAliases, followed_rollouts
from gateway.routing.budget import spent_by_variant
from gateway.status.source import StatusSource, WorkerPlace
from gateway.status.traffic import TrafficHistory
from gateway.workers import WorkerIndex
from serving.kubernetes.discovery import Discovery
from serving.registry import Registry
from serving.state.database import StateDatabase
from serving.state.link import Link


@dataclass(frozen=True, slots=True)
class Observability:
    """Where requests are counted, logged and traced; `usage` is None without a state database."""

    metrics: Metrics
    usage: UsageRecorder | None
    observers: Observers


@asynccontextmanager
async def observability(
    deployment: Deployment, live_config: LiveConfig, access_log_stream: BinaryIO
) -> AsyncIterator[Observability]:
    """Open the access log, usage and traces; every series of the configured aliases exists at 0."""
    settings = deployment.settings.gateway
    metrics = Metrics(per_key=settings.per_key_metrics)
    create_series(metrics, live_config.catalog, live_config.keys.names())
    with AccessLog(access_log_stream, settings.access_log, metrics.log_lines_dropped) as access_log:
        async with (
            recorded_usage(deployment.state, settings.usage_days, metrics) as usage,
            tracing(settings.tracing) as traced,
            LoopLag(metrics.loop_lag_seconds),
        ):
            sink = access_log.append if usage is None else both(access_log.append, usage.add)
            yield Observability(metrics, usage, Observers(metrics, sink, traced))


@dataclass(frozen=True, slots=True)
class Routing:
    """What chooses a replica for each request and sends it there."""

    load: LoadTracker
    external: ExternalModels
    dispatcher: Dispatcher
    poller: MetricsPoller
    proxy: Proxy


@asynccontextmanager
async def routing(
    deployment: Deployment, registry: Registry, live_config: LiveConfig, observed: Observability, place: WorkerIndex
) -> AsyncIterator[Routing]:
    """Connect to replicas and external models, and poll replicas; workers share budgets and polls equally."""
    settings, metrics = deployment.settings.gateway, observed.metrics
    load = LoadTracker(registry.in_flight, deployment.speeds)
    async with AsyncExitStack() as stack:
        pool = await stack.enter_async_context(Pool())
        external, upstream = await external_models(stack, deployment, registry, observed, pool, place.share)
        dispatcher = stack.enter_context(
            Dispatcher(registry, load, metrics, settings.queue, settings.retries, exchanges=upstream)
        )
        external.replace(external_model_replicas(deployment.settings.variants))
        # On connections of their own: polls and requests do not wait for each other.
        polls = await stack.enter_async_context(Pool())
        poller = await stack.enter_async_context(
            MetricsPoller(
                *(registry, polls, dispatcher, metrics.polls),
                intervals=intervals_of(place.of),
                share=PollShare(place.number, place.of, place.polls) if place.polls else None,
                on_answer=dispatcher.poll_answered,
            )
        )
        for collector in collectors(registry, live_config, dispatcher, poller, load):
            metrics.registry.register(collector)
        yield Routing(load, external, dispatcher, poller, Proxy(dispatcher, upstream, external.unsupported))


async def external_models(
    stack: AsyncExitStack, deployment: Deployment, registry: Registry, observed: Observability, pool: Pool, share: float
) -> tuple[ExternalModels, UpstreamByKind]:
    """Connect to the models of other providers, if there are any: litellm is loaded only then."""
    settings = deployment.settings
    loaded = bool(external_model_replicas(settings.variants))
    if not loaded:
        external = stack.enter_context(ExternalModels(registry, observed.metrics, loaded=False, share=share))
        return external, UpstreamByKind(VllmUpstream(pool), None)
    spent, litellm = await spent_today(observed.usage, settings), load_litellm()
    parameters = ParameterTable(litellm)
    external = stack.enter_context(
        ExternalModels(registry, observed.metrics, loaded=True, share=share, spent=spent, parameters=parameters.of)
    )
    providers = await stack.enter_async_context(ExternalUpstream(litellm, external, parameters))
    return external, UpstreamByKind(VllmUpstream(pool), providers)


async def spent_today(usage: UsageRecorder | None, settings: Settings) -> Mapping[str, float]:
    """What each external model has cost since midnight (UTC) before this start, by the usage of all processes."""
    return {} if usage is None else spent_by_variant(await usage.external_cost_today(), external_ladders(settings))


def collectors(
    registry: Registry, live_config: LiveConfig, dispatcher: Dispatcher, poller: MetricsPoller, load: LoadTracker
) -> Iterator[Collector]:
    """What computes metrics at each scrape."""
    breakers, silent = dispatcher.breaker_states, dispatcher.cluster.silent

    def waiting() -> dict[str, int]:
        return {**dict.fromkeys(live_config.catalog.aliases, 0), **dispatcher.waiting()}

    def certificates() -> dict[str, float]:
        return {tls.certificate: tls.expiration} if (tls := live_config.tls) else {}

    yield FleetCollector(registry, live_config.variants, breakers, waiting, lambda: silent, certificates)
    yield EngineCollector(registry, lambda: poller.results)
    yield LadderCollector(
        dispatcher.cluster.gates,
        lambda: live_config.catalog,
        lambda: iter(registry.ready),
        load.estimates,
        lambda: load.speeds,
    )


@dataclass(frozen=True, slots=True)
class RolloutRouting:
    """What rollouts change of routing: the arms of aliases, and the revisions in force."""

    arms: Rollouts
    recorded: RecordedAliases
    away: Callable[[], str | None]  # why the state database cannot be read


@asynccontextmanager
async def rollout_routing(
    deployment: Deployment, registry: Registry, live_config: LiveConfig, dispatcher: Dispatcher, metrics: Metrics
) -> AsyncIterator[RolloutRouting]:
    """Follow the recorded revisions of aliases, and drive rollouts."""
    arms = Rollouts(dispatcher.affinity.placement)
    recorded = RecordedAliases(deployment, live_config, arms, dispatcher.cluster, metrics.rollout_conversations)
    async with followed_rollouts(deployment.state, recorded, arms, registry, metrics) as service:
        yield RolloutRouting(arms, recorded, lambda: service.follower.away if service else None)


@asynccontextmanager
async def database_keys(deployment: Deployment, recorded: RecordedAliases, quota: Quota) -> AsyncIterator[None]:
    """Follow the API keys in the state database, if they are there."""
    if deployment.state is None or not deployment.settings.gateway.keys_in_database:
        yield
        return

    async with followed_keys(deployment.state, partial(use_keys, recorded, quota)):
        yield


def use_keys(recorded: RecordedAliases, quota: Quota, keys: Keys) -> None:
    """Use other keys from the next request on, and forget what those that are gone have used."""
    recorded.use_keys(keys)
    quota.keep_only(keys.names())


@asynccontextmanager
async def shared_quota(deployment: Deployment, quota: Quota, metrics: Metrics) -> AsyncIterator[None]:
    """Share the limits of keys with other gateways if the state is in PostgreSQL.

    SQLite is on one machine: its workers divide the limits equally.
    """
    database = None if deployment.state is None else StateDatabase.at(deployment.state)
    if database is None or database.engine.file is not None:
        yield
        return

    link = Link(database, CALL_SECONDS)
    async with QuotaLeases(link, quota, metrics.quota_local):
        yield


def router_for(
    settings: GatewaySettings,
    address: str,
    live_config: LiveConfig,
    registry: Registry,
    proxy: Proxy,
    quota: Quota,
    observers: Observers,
    arms: Rollouts,
) -> Router:
    """Build what answers on the clients' port."""
    endpoints = {
        endpoint.path.encode(): InferenceHandler(endpoint, live_config, proxy, quota, observers, arms)
        for endpoint in ENDPOINTS.values()
    }
    hosts = allowed_hosts(address, settings.allowed_hosts)
    return Router(endpoints, client_app(live_config, registry), live_config, quota, hosts)


@dataclass(frozen=True, slots=True)
class AdminPort:
    """The app of the admin port, without authentication, and the traffic that it shows."""

    app: FastAPI
    traffic: TrafficHistory


@asynccontextmanager
async def admin_port(
    registry: Registry,
    live_config: LiveConfig,
    observed: Observability,
    routed: Routing,
    rollouts: RolloutRouting,
    router: Router,
    place: WorkerIndex,
    discovery: Discovery | None,
) -> AsyncIterator[AdminPort]:
    """Sample the traffic, and build the app."""
    kubernetes_away = (lambda: None) if discovery is None else discovery.away
    recorded, dispatcher = rollouts.recorded, routed.dispatcher
    async with (
        TrafficHistory(observed.metrics) as traffic,
        RolloutAdministration(
            recorded.deployment.state, lambda: recorded.deployment, lambda: recorded.snapshot, registry
        ) as administration,
    ):
        status = StatusSource(
            *(registry, live_config, dispatcher, observed.metrics, traffic, observed.observers.errors, rollouts.arms),
            polls=lambda: routed.poller.results,
            speeds=lambda: recorded.deployment.speeds,
            rollouts=lambda: administration.statuses,
            state_away=rollouts.away,
            kubernetes_away=kubernetes_away,
            draining=lambda: router.draining,
            place=WorkerPlace(place.number, place.of),
        )
        context = AdminContext(
            *(live_config, registry, observed.metrics, router, dispatcher),
            *(status, administration, rollouts.away, observed.usage, kubernetes_away),
        )
        yield AdminPort(admin_app(context), traffic)
