"""The composition root: builds every object of the gateway and hands it on. Start reading here."""

import logging
import ssl
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from config.schema import GatewaySettings, Settings
from config.variant import goldens
from gateway.components import (
    Routing,
    admin_port,
    database_keys,
    observability,
    rollout_routing,
    router_for,
    routing,
    shared_quota,
    use_keys,
)
from gateway.deployment import Deployment
from gateway.handlers.admin import with_auth
from gateway.handover import offered_to_successor
from gateway.http.collector import ConnectionCollector
from gateway.http.hosts import allowed_hosts
from gateway.http.listener import listen
from gateway.http.server import HttpServer, serve_clients
from gateway.http.sockets import ADMIN, CLIENT, InheritedSockets, ListenSockets, address_of
from gateway.http.tls import context_with
from gateway.keys import Keys
from gateway.keys.file_follower import KeyFileFollower
from gateway.live_config import LiveConfig
from gateway.observability.metrics import DiscoveryCollector, Metrics
from gateway.proxy.dispatcher import Dispatcher
from gateway.proxy.external_models import external_model_replicas
from gateway.quota import Quota
from gateway.reload import ConfigReload, FollowerReload, SupervisedReload
from gateway.rollout.recorded import RecordedAliases, live_config_of, log_notices
from gateway.status.traffic import TrafficHistory
from gateway.workers import (
    SINGLE_WORKER,
    WorkerIndex,
    handed_over_by_parent,
    with_worker_ports,
)
from serving.app import discovered_replicas, followed_replicas, local_replicas, sole_owner
from serving.command import Machine
from serving.control import Controlled, ControlSocket
from serving.kubernetes.discovery import Discovery
from serving.probe import Probe
from serving.readiness import verified_replicas
from serving.registry import Registry
from serving.reload import Reload
from serving.service_manager import ServiceManager
from serving.takeover import Predecessor
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
        self.server.memory_bytes, self.server.grace_seconds = settings.memory_bytes, settings.drain_seconds

    def use_keys(self, keys: Keys) -> None:
        """Use other API keys from the next request on."""
        use_keys(self.recorded, self.quota, keys)


NO_SOCKETS, NO_MANAGER = InheritedSockets(), ServiceManager()


@contextmanager
def listen_sockets(settings: GatewaySettings, inherited: InheritedSockets = NO_SOCKETS) -> Iterator[ListenSockets]:
    """Take both ports before anything that costs time is started; ConfigError if one is in use."""
    with (
        inherited.take(CLIENT, settings.listen, "gateway.listen") as client,
        inherited.take(ADMIN, settings.admin, "gateway.admin") as admin,
    ):
        inherited.close_unused(client, admin)
        yield ListenSockets(client, admin, inherited.next_acceptor)


@asynccontextmanager
async def gateway(
    deployment: Deployment,
    registry: Registry,
    taken: ListenSockets,
    place: WorkerIndex = SINGLE_WORKER,
    access_log_stream: BinaryIO | None = None,
    discovery: Discovery | None = None,
) -> AsyncIterator[Gateway]:
    """Serve clients and operators; when the block ends, running requests finish first.

    Who accepts connections then is in `taken.next_acceptor`: without one, new requests are refused meanwhile. Otherwise
    this process accepts none any more, and its admin port closes first, so that its successor answers there.

    The access log is written to `access_log_stream`, by default to stderr. `discovery` is shown to operators.
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
        await enter(database_keys(deployment, recorded, quota))
        await enter(shared_quota(deployment, quota, metrics))
        router = router_for(settings, addresses.client, live_config, registry, proxy, quota, observers, arms)
        admin = await enter(admin_port(registry, live_config, observed, routed, rollouts, router, place, discovery))
        admin_hosts = allowed_hosts(addresses.admin, settings.allowed_hosts)
        admin_server = await enter(listen(with_auth(admin.app, settings.admin_key, admin_hosts), taken.admin))
        if observed.usage is not None:  # once more before the admin port closes, which may take too long
            stack.push_async_callback(observed.usage.flush)
        server = HttpServer(router, settings.memory_bytes, on_client_aborted=metrics.client_cut)
        metrics.registry.register(ConnectionCollector(server))
        metrics.registry.register(DiscoveryCollector(lambda: discovery.statuses if discovery else ()))
        tls = context_with(lambda: certificate_of(live_config)) if deployment.server_tls else None
        await enter(serve_clients(server, taken.client, settings.drain_seconds, tls, lambda: taken.next_acceptor))
        log.info("listening on %s, admin on http://%s", url_of(settings, addresses.client), addresses.admin)
        try:
            yield Gateway(addresses, live_config, recorded, server, quota, metrics, routed, admin.traffic)
        finally:
            if taken.next_acceptor == "none":
                router.draining = True
            else:
                admin_server.stop_accepting()


def live_config_for(deployment: Deployment) -> LiveConfig:
    """What requests go by at the start; aliases, rungs and variants without effect are logged."""
    log_notices(deployment)
    return live_config_of(deployment)


@dataclass(frozen=True, slots=True)
class ProcessContext:
    """How a gateway process was started, and by whom.

    `home`: where the commands of `serving.control_cli` and a successor reach it; None: nowhere. `verified`: it accepts
    connections only when its replicas are verified, those that are ready at a `predecessor` among them.
    """

    place: WorkerIndex = SINGLE_WORKER
    home: Path | None = None
    inherited: InheritedSockets = NO_SOCKETS
    predecessor: Predecessor | None = None
    verified: bool = False
    manager: ServiceManager = NO_MANAGER


STARTED_BY_HAND = ProcessContext()


@asynccontextmanager
async def gateway_alone(
    deployment: Deployment, path: Path | None = None, process: ProcessContext = STARTED_BY_HAND
) -> AsyncIterator[Addresses]:
    """Serve replicas that run elsewhere: those with a `url` or `kubernetes`, and those in the state database.

    With a path, changes of that file are applied. A predecessor stops when this process accepts connections; it raises
    TakeoverRefused if replicas are not ready in time.
    """
    home, place, predecessor = process.home, process.place, process.predecessor
    registry, started = Registry(), deployment
    deployment = with_worker_ports(deployment, place)
    wanted = deployment.wanted
    with listen_sockets(deployment.settings.gateway, process.inherited) as taken:
        shown = controlled("gateway", path, registry, deployment.settings.gateway, taken)
        async with (
            ControlSocket(home, shown) if home else nullcontext() as control,
            Probe() as probe,
            Watch(wanted.external, registry, probe, goldens(deployment.variants)) as watch,
            followed_replicas(wanted, registry, probe) as follower,
            discovered_replicas(wanted, registry, probe) as discovery,
            verified_replicas(
                registry,
                predecessor.ready if predecessor else frozenset(),
                required=needs_replicas(deployment.settings),
            )
            if process.verified
            else nullcontext(),
            gateway(deployment, registry, taken, place, discovery=discovery) as served,
            following(
                path,
                started,
                registry,
                served,
                FollowerReload(
                    watch,
                    follower,
                    registry,
                    served.live_config,
                    external_models=served.available_external,
                    discovery=discovery,
                ),
                process.manager,
            ) as reload,
        ):
            if control is not None and reload is not None:
                control.last_reload = lambda: reload.last
            if predecessor is not None:
                predecessor.commit()
                taken.next_acceptor = "none"
            sockets = {CLIENT: taken.client, ADMIN: taken.admin}
            with (
                offered_to_successor(control, sockets, taken, process.manager),
                handed_over_by_parent(taken, place),
            ):
                yield served.addresses


def needs_replicas(settings: Settings) -> bool:
    """Whether requests can be answered by replicas only, not by models of other providers alone."""
    return bool(settings.replicas) or "state" in settings.gateway.model_fields_set


@asynccontextmanager
async def everything(
    deployment: Deployment,
    machine: Machine,
    registry: Registry,
    home: Path,
    path: Path | None = None,
    access_log_stream: BinaryIO | None = None,
    process: ProcessContext = STARTED_BY_HAND,
) -> AsyncIterator[Addresses]:
    """Gateway and replicas on one machine; requests end before their replicas do.

    With a path, that file is followed. The access log is written to `access_log_stream`, by default to stderr.
    """
    wanted = deployment.wanted
    with sole_owner(wanted, home) as owner, listen_sockets(deployment.settings.gateway, process.inherited) as taken:
        shown = controlled("up" if path else "demo", path, registry, deployment.settings.gateway, taken)
        async with (
            Probe() as probe,
            ControlSocket(home, shown) as control,
            local_replicas(wanted, machine, registry, probe, home, owner) as own,
            Watch(wanted.external, registry, probe, goldens(deployment.variants)) as watch,
            discovered_replicas(wanted, registry, probe) as discovery,
            gateway(deployment, registry, taken, access_log_stream=access_log_stream, discovery=discovery) as served,
            following(
                path, deployment, registry, served, SupervisedReload(watch, own, discovery), process.manager
            ) as reload,
        ):
            control.restart = own.restart
            if reload is not None:
                control.last_reload = lambda: reload.last
            try:
                yield served.addresses
            finally:
                process.manager.stopping()


def url_of(settings: GatewaySettings, address: str) -> str:
    """Return the URL of the clients' port."""
    return f"{'https' if settings.tls else 'http'}://{address}"


def certificate_of(live_config: LiveConfig) -> ssl.SSLContext:
    """Return what a new connection is shown."""
    assert live_config.tls is not None, "a reload does not remove it"
    return live_config.tls.context


def controlled(
    command: str, path: Path | None, registry: Registry, settings: GatewaySettings, taken: ListenSockets
) -> Controlled:
    """What the control socket of a gateway shows."""
    urls = {"clients": url_of(settings, address_of(taken.client)), "admin": f"http://{address_of(taken.admin)}"}
    return Controlled(command, path, registry, urls)


@asynccontextmanager
async def following(
    path: Path | None,
    started: Deployment,
    registry: Registry,
    served: Gateway,
    replicas: FollowerReload | SupervisedReload,
    manager: ServiceManager,
) -> AsyncIterator[Reload | None]:
    """Apply a configuration file whenever it changes, and at SIGHUP; None: there is no file.

    The keys file is followed by itself, too: a revoked key must not wait for replicas, nor for a valid configuration.
    """
    if path is None:
        yield None
        return
    config = ConfigReload(
        path,
        started,
        registry,
        served.live_config,
        served.use_keys,
        served.switch,
        replicas.apply,
        served.recorded.with_recorded,
    )

    async def apply(confirmed: bool) -> None:
        with manager.reloading(f"listening on {served.addresses.client}"):
            await config.apply(confirmed)

    async with (
        Reload(config.files, apply, lambda outcome: served.metrics.reloads.labels(outcome).inc()) as it,
        KeyFileFollower(lambda: config.keys_path, config.apply_keys),
    ):
        yield it
