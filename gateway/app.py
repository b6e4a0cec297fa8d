"""The composition root: builds every object of the gateway and hands it on. Start reading here."""

import logging
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from socket import socket
from typing import BinaryIO

from prometheus_client.registry import Collector

from config.schema import GatewaySettings, Settings
from config.variant import goldens
from gateway.deployment import Deployment
from gateway.handlers.admin import AdminContext, admin_app, with_auth
from gateway.handlers.inference import InferenceHandler, Observers
from gateway.handlers.models import client_app
from gateway.handlers.router import Router
from gateway.http.collector import ConnectionCollector
from gateway.http.hosts import allowed_hosts
from gateway.http.listener import address_of, bind, listen
from gateway.http.server import HttpServer, serve_clients
from gateway.live_config import LiveConfig, LiveWeights
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
from gateway.proxy.load.polling import MetricsPoller
from gateway.proxy.load.tracker import LoadTracker
from gateway.proxy.upstream.by_kind import UpstreamByKind
from gateway.proxy.upstream.external import ExternalUpstream, load_litellm
from gateway.proxy.upstream.pool import Pool
from gateway.proxy.upstream.vllm import VllmUpstream
from gateway.quota import Quota
from gateway.reload import ConfigReload, FollowerReload, SupervisedReload
from gateway.rollout.administration import RolloutAdministration
from gateway.rollout.arms import Rollouts
from gateway.rollout.recorded import RecordedAliases, followed_rollouts, live_config_of, log_notices
from gateway.routing.budget import spent_by_variant
from gateway.status.recent_errors import RecentErrors
from gateway.status.source import StatusSource, WorkerPlace
from gateway.status.traffic import TrafficHistory
from gateway.workers import SINGLE_WORKER, WorkerIndex, with_worker_ports
from serving.app import followed_replicas, local_replicas, sole_owner
from serving.command import Machine
from serving.control import Controlled, ControlSocket
from serving.probe import Probe
from serving.registry import Registry
from serving.reload import Reload
from serving.watch import Watch

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where the two listeners really are."""

    client: str
    admin: str


@dataclass(frozen=True, slots=True)
class Gateway:
    """A gateway that runs: where it listens, and what a reload changes."""

    addresses: Addresses
    live_config: LiveConfig
    weights: LiveWeights
    recorded: RecordedAliases
    server: HttpServer
    quota: Quota
    metrics: Metrics
    load: LoadTracker
    dispatcher: Dispatcher
    traffic: TrafficHistory
    external: ExternalModels

    def switch(self, deployment: Deployment) -> None:
        """Use another configuration from the next request on; `config/reload_effects.py` says for which options."""
        settings = deployment.settings.gateway
        self.recorded.configure(deployment)
        self.external.replace(external_model_replicas(deployment.settings.variants))
        self.load.set_speeds(deployment.speeds)
        self.dispatcher.keep_only(self.live_config.catalog)
        self.dispatcher.set_limits(settings.queue, settings.retries)
        self.quota.keep_only(deployment.keys.names())
        self.server.memory_bytes, self.server.grace_seconds = settings.memory_bytes, settings.drain_seconds


@dataclass(frozen=True, slots=True)
class ListenSockets:
    """Sockets that listen; connections wait in them until the server is there."""

    client: socket
    admin: socket


@contextmanager
def listen_sockets(settings: GatewaySettings, place: WorkerIndex = SINGLE_WORKER) -> Iterator[ListenSockets]:
    """Take both ports before anything that costs time is started; ConfigError if one is in use."""
    with (
        bind(settings.listen, "gateway.listen", shared=place.of > 1) as client,
        bind(settings.admin, "gateway.admin") as admin,
    ):
        yield ListenSockets(client, admin)


@asynccontextmanager
async def gateway(
    deployment: Deployment,
    registry: Registry,
    taken: ListenSockets,
    place: WorkerIndex = SINGLE_WORKER,
    access_log_stream: BinaryIO | None = None,
) -> AsyncIterator[Gateway]:
    """Serve clients and operators; when the block ends, running requests finish first.

    The access log is written to `access_log_stream`, by default to stderr.
    """
    settings = deployment.settings.gateway
    live_config, metrics = live_config_for(deployment), Metrics(per_key=settings.per_key_metrics)
    quota, weights = Quota(place.share), LiveWeights()
    create_series(metrics, live_config.catalog, live_config.keys.names())
    async with AsyncExitStack() as stack:
        stream = access_log_stream or sys.stderr.buffer
        access_log = stack.enter_context(AccessLog(stream, settings.access_log, metrics.log_lines_dropped))
        usage = await stack.enter_async_context(recorded_usage(deployment.state, settings.usage_days, metrics))
        traced = await stack.enter_async_context(tracing(settings.tracing))
        await stack.enter_async_context(LoopLag(metrics.loop_lag_seconds))
        pool = await stack.enter_async_context(Pool())
        load = LoadTracker(registry.in_flight, deployment.speeds)
        models = external_model_replicas(deployment.settings.variants)
        spent = await spent_today(usage, deployment.settings) if models else {}
        external = stack.enter_context(
            ExternalModels(registry, metrics, loaded=bool(models), share=place.share, spent=spent)
        )
        providers = ExternalUpstream(load_litellm(), external.book) if models else None
        upstream = UpstreamByKind(VllmUpstream(pool), await stack.enter_async_context(providers) if providers else None)
        dispatcher = stack.enter_context(
            Dispatcher(
                *(registry, load, metrics, settings.queue, settings.retries),
                weights=lambda: weights.current,
                exchanges=upstream,
            )
        )
        external.replace(models)
        # On connections of their own: polls and requests do not wait for each other.
        polls = await stack.enter_async_context(Pool())
        poller = await stack.enter_async_context(
            MetricsPoller(registry, polls, dispatcher, metrics.polls, on_answer=dispatcher.poll_answered)
        )
        for collector in collectors(registry, live_config, dispatcher, poller, load):
            metrics.registry.register(collector)
        proxy = Proxy(dispatcher, upstream)
        rollouts = Rollouts(dispatcher.affinity.placement)
        recorded = RecordedAliases(deployment, live_config, rollouts, dispatcher.cluster, metrics.rollout_conversations)
        service = await stack.enter_async_context(
            followed_rollouts(deployment.state, recorded, rollouts, registry, metrics)
        )
        log_sink = access_log.append if usage is None else both(access_log.append, usage.add)
        errors = RecentErrors()
        observers = Observers(metrics, log_sink, traced, errors=errors)
        endpoints = {
            endpoint.path.encode(): InferenceHandler(endpoint, live_config, proxy, quota, observers, rollouts)
            for endpoint in ENDPOINTS.values()
        }
        addresses = Addresses(address_of(taken.client), address_of(taken.admin))
        client_hosts, admin_hosts = (
            allowed_hosts(address, settings.allowed_hosts) for address in (addresses.client, addresses.admin)
        )
        router = Router(endpoints, client_app(live_config, registry), live_config, quota, client_hosts)
        traffic = await stack.enter_async_context(TrafficHistory(metrics))
        administration = await stack.enter_async_context(
            RolloutAdministration(deployment.state, lambda: recorded.deployment, lambda: recorded.snapshot, registry)
        )

        def state_away() -> str | None:
            return service.follower.away if service else None

        status = StatusSource(
            *(registry, live_config, dispatcher, metrics, traffic, errors, rollouts),
            polls=lambda: poller.results,
            speeds=lambda: recorded.deployment.speeds,
            rollouts=lambda: administration.statuses,
            state_away=state_away,
            draining=lambda: router.draining,
            place=WorkerPlace(place.number, place.of),
        )
        context = AdminContext(
            live_config, registry, metrics, router, dispatcher, status, administration, state_away, usage
        )
        secured = with_auth(admin_app(context), settings.admin_key, admin_hosts)
        await stack.enter_async_context(listen(secured, taken.admin))
        server = HttpServer(router, settings.memory_bytes, on_client_aborted=metrics.client_cut)
        metrics.registry.register(ConnectionCollector(server))
        await stack.enter_async_context(serve_clients(server, taken.client, settings.drain_seconds))
        log.info("listening on http://%s, admin on http://%s", addresses.client, addresses.admin)
        try:
            yield Gateway(
                addresses, live_config, weights, recorded, server, quota, metrics, load, dispatcher, traffic, external
            )
        finally:
            router.draining = True


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

    yield FleetCollector(registry, live_config.variants, breakers, waiting, lambda: silent)
    yield EngineCollector(registry, lambda: poller.results)
    yield LadderCollector(
        dispatcher.cluster.gates,
        lambda: live_config.catalog,
        lambda: iter(registry.ready),
        load.estimates,
        lambda: load.speeds,
    )


def live_config_for(deployment: Deployment) -> LiveConfig:
    """What requests go by at the start; aliases, rungs and variants without effect are logged."""
    log_notices(deployment)
    return live_config_of(deployment)


@asynccontextmanager
async def gateway_alone(
    deployment: Deployment, path: Path | None = None, place: WorkerIndex = SINGLE_WORKER, home: Path | None = None
) -> AsyncIterator[Addresses]:
    """Serve replicas that run elsewhere: those with a `url` in the configuration, and those in the state database.

    With a path, changes of that file are applied; with a home, the commands of `serving.control_cli` reach us there.
    """
    registry, started = Registry(), deployment
    deployment = with_worker_ports(deployment, place)
    wanted = deployment.wanted
    with listen_sockets(deployment.settings.gateway, place) as taken:
        async with (
            ControlSocket(home, controlled("gateway", path, registry, taken)) if home else nullcontext() as control,
            Probe() as probe,
            Watch(wanted.external, registry, probe, goldens(deployment.variants)) as watch,
            followed_replicas(wanted, registry, probe) as follower,
            gateway(deployment, registry, taken, place) as served,
            following(
                path, started, registry, served, FollowerReload(watch, follower, registry, served.live_config)
            ) as reload,
        ):
            if control is not None and reload is not None:
                control.last_reload = lambda: reload.last
            yield served.addresses


@asynccontextmanager
async def everything(
    deployment: Deployment,
    machine: Machine,
    registry: Registry,
    home: Path,
    path: Path | None = None,
    access_log_stream: BinaryIO | None = None,
) -> AsyncIterator[Addresses]:
    """Gateway and replicas on one machine; requests end before their replicas do.

    With a path, that file is followed. The access log is written to `access_log_stream`, by default to stderr.
    """
    wanted = deployment.wanted
    with sole_owner(wanted, home) as owner, listen_sockets(deployment.settings.gateway) as taken:
        async with (
            Probe() as probe,
            ControlSocket(home, controlled("up" if path else "demo", path, registry, taken)) as control,
            local_replicas(wanted, machine, registry, probe, home, owner) as own,
            Watch(wanted.external, registry, probe, goldens(deployment.variants)) as watch,
            gateway(deployment, registry, taken, access_log_stream=access_log_stream) as served,
            following(path, deployment, registry, served, SupervisedReload(watch, own)) as reload,
        ):
            control.restart = own.restart
            if reload is not None:
                control.last_reload = lambda: reload.last
            yield served.addresses


def controlled(command: str, path: Path | None, registry: Registry, taken: ListenSockets) -> Controlled:
    """What the control socket of a gateway shows."""
    urls = {"clients": f"http://{address_of(taken.client)}", "admin": f"http://{address_of(taken.admin)}"}
    return Controlled(command, path, registry, urls)


@asynccontextmanager
async def following(
    path: Path | None,
    started: Deployment,
    registry: Registry,
    served: Gateway,
    replicas: FollowerReload | SupervisedReload,
) -> AsyncIterator[Reload | None]:
    """Apply a configuration file whenever it changes, and at SIGHUP; None: there is no file."""
    if path is None:
        yield None
        return
    config = ConfigReload(
        path, started, registry, served.live_config, served.switch, replicas.apply, served.recorded.with_recorded
    )
    async with Reload(config.files, config.apply, lambda outcome: served.metrics.reloads.labels(outcome).inc()) as it:
        yield it
