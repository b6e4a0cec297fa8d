"""The composition root: builds every object of the gateway and hands it on. Start reading here."""

import logging
import ssl
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import BinaryIO

from config.schema import GatewaySettings
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
from gateway.http.collector import ConnectionCollector
from gateway.http.hosts import allowed_hosts
from gateway.http.listener import listen
from gateway.http.server import HttpServer, serve_clients
from gateway.http.sockets import ADMIN, CLIENT, InheritedSockets, ListenSockets, address_of
from gateway.http.tls import context_with
from gateway.keys import Keys
from gateway.live_config import LiveConfig
from gateway.observability.metrics import DiscoveryCollector, Metrics
from gateway.proxy.dispatcher import Dispatcher
from gateway.proxy.external_models import external_model_replicas
from gateway.quota import Quota
from gateway.rollout.recorded import RecordedAliases, live_config_of, log_notices
from gateway.status.traffic import TrafficHistory
from gateway.workers import (
    SINGLE_WORKER,
    WorkerIndex,
)
from serving.kubernetes.discovery import Discovery
from serving.registry import Registry

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


NO_SOCKETS = InheritedSockets()


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


def url_of(settings: GatewaySettings, address: str) -> str:
    """Return the URL of the clients' port."""
    return f"{'https' if settings.tls else 'http'}://{address}"


def certificate_of(live_config: LiveConfig) -> ssl.SSLContext:
    """Return what a new connection is shown."""
    assert live_config.tls is not None, "a reload does not remove it"
    return live_config.tls.context
