"""The composition root: builds every object of the gateway and hands it on. Start reading here."""

import logging
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from socket import socket
from typing import BinaryIO

from config.schema import GatewaySettings
from config.variant import goldens
from gateway.components import Routing, admin_port, observability, rollout_routing, router_for, routing
from gateway.deployment import Deployment
from gateway.handlers.admin import with_auth
from gateway.http.collector import ConnectionCollector
from gateway.http.hosts import allowed_hosts
from gateway.http.listener import address_of, bind, listen
from gateway.http.server import HttpServer, serve_clients
from gateway.live_config import LiveConfig
from gateway.observability.metrics import Metrics
from gateway.proxy.dispatcher import Dispatcher
from gateway.proxy.external_models import external_model_replicas
from gateway.quota import Quota
from gateway.reload import ConfigReload, FollowerReload, SupervisedReload
from gateway.rollout.recorded import RecordedAliases, live_config_of, log_notices
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
    recorded: RecordedAliases
    server: HttpServer
    quota: Quota
    metrics: Metrics
    routing: Routing
    traffic: TrafficHistory

    @property
    def dispatcher(self) -> Dispatcher:
        """What chooses a replica for each request."""
        return self.routing.dispatcher

    def available_external(self, deployment: Deployment) -> frozenset[str]:
        """The external variants of another configuration that answer as soon as it is in use."""
        return self.routing.external.available(external_model_replicas(deployment.settings.variants))

    def switch(self, deployment: Deployment) -> None:
        """Use another configuration from the next request on; `config/reload_effects.py` says for which options."""
        settings = deployment.settings.gateway
        self.recorded.configure(deployment)
        self.routing.external.replace(external_model_replicas(deployment.settings.variants))
        self.routing.load.set_speeds(deployment.speeds)
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
    live_config, quota = live_config_for(deployment), Quota(place.share)
    addresses = Addresses(address_of(taken.client), address_of(taken.admin))
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        observed = await enter(observability(deployment, live_config, access_log_stream or sys.stderr.buffer))
        metrics, observers = observed.metrics, observed.observers
        routed = await enter(routing(deployment, registry, live_config, observed, place))
        dispatcher, proxy = routed.dispatcher, routed.proxy
        rollouts = await enter(rollout_routing(deployment, registry, live_config, dispatcher, metrics))
        recorded, arms = rollouts.recorded, rollouts.arms
        router = router_for(settings, addresses.client, live_config, registry, proxy, quota, observers, arms)
        admin = await enter(admin_port(deployment, registry, live_config, observed, routed, rollouts, router, place))
        admin_hosts = allowed_hosts(addresses.admin, settings.allowed_hosts)
        await enter(listen(with_auth(admin.app, settings.admin_key, admin_hosts), taken.admin))
        if observed.usage is not None:  # once more before the admin port closes, which may take too long
            stack.push_async_callback(observed.usage.flush)
        server = HttpServer(router, settings.memory_bytes, on_client_aborted=metrics.client_cut)
        metrics.registry.register(ConnectionCollector(server))
        await enter(serve_clients(server, taken.client, settings.drain_seconds))
        log.info("listening on http://%s, admin on http://%s", addresses.client, addresses.admin)
        try:
            yield Gateway(addresses, live_config, recorded, server, quota, metrics, routed, admin.traffic)
        finally:
            router.draining = True


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
                path,
                started,
                registry,
                served,
                FollowerReload(
                    watch, follower, registry, served.live_config, external_models=served.available_external
                ),
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
