"""The composition root: builds every object of the gateway and hands it on. Start reading here."""

import logging
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from socket import socket

from config.schema import GatewaySettings, Settings
from config.variant import Variant
from gateway.admin import admin_app
from gateway.api.endpoint import InferenceEndpoint
from gateway.api.routes import client_app
from gateway.keys import Keys, read_keys
from gateway.listener import address_of, bind, listen
from gateway.metrics import FleetCollector, Metrics
from gateway.relay.exchange import Relay
from gateway.relay.pool import Pool
from gateway.routing.catalog import Catalog
from serving.app import Wanted, others_replicas, own_replicas, read_wanted, sole_owner
from serving.command import Machine
from serving.probe import Probe
from serving.registry import Registry
from serving.replica import foreign_replicas
from serving.watch import Watch

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Deployment:
    """A configuration with everything that it refers to, read; `folder` is where it lies."""

    settings: Settings
    variants: Mapping[str, Variant]
    keys: Keys
    state: str | None = None  # where the state database is; None: neither told nor asked
    folder: Path = Path()

    @property
    def wanted(self) -> Wanted:
        """What serving needs to know of it."""
        return Wanted(self.settings, self.variants, self.state, self.folder)


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where the two listeners really are."""

    client: str
    admin: str


@dataclass(frozen=True, slots=True)
class Ports:
    """Sockets that listen; connections wait in them until the server is there."""

    client: socket
    admin: socket


def read_deployment(path: Path) -> Deployment:
    """Read a configuration file, the manifests and the keys it names; ConfigError if anything is wrong."""
    wanted = read_wanted(path)
    named = wanted.settings.gateway.keys
    keys = read_keys(path.parent / named) if named else Keys()
    return Deployment(wanted.settings, wanted.variants, keys, wanted.state, wanted.folder)


@contextmanager
def ports(settings: GatewaySettings) -> Iterator[Ports]:
    """Take both ports before anything that costs time is started; ConfigError if one is in use."""
    with bind(settings.listen, "gateway.listen") as client, bind(settings.admin, "gateway.admin") as admin:
        yield Ports(client, admin)


@asynccontextmanager
async def gateway(deployment: Deployment, registry: Registry, taken: Ports) -> AsyncIterator[Addresses]:
    """Serve clients and operators; when the block ends, running requests finish first."""
    settings = deployment.settings.gateway
    catalog = Catalog(deployment.settings.aliases, deployment.variants)
    metrics = Metrics()
    metrics.registry.register(FleetCollector(registry, tuple(deployment.variants.values())))
    async with AsyncExitStack() as stack:
        pool = await stack.enter_async_context(Pool())
        relay = Relay(registry, pool, settings.limits.queue_seconds)

        def endpoint(name: str) -> InferenceEndpoint:
            return InferenceEndpoint(name, catalog, relay, metrics, settings.limits, deployment.keys)

        clients = client_app(catalog, registry, deployment.keys, endpoint)
        await stack.enter_async_context(listen(admin_app(catalog, registry, metrics), taken.admin))
        await stack.enter_async_context(listen(clients, taken.client))
        addresses = Addresses(address_of(taken.client), address_of(taken.admin))
        log.info("listening on http://%s, admin on http://%s", addresses.client, addresses.admin)
        yield addresses


@asynccontextmanager
async def gateway_alone(deployment: Deployment) -> AsyncIterator[Addresses]:
    """The gateway in front of replicas that run elsewhere: told by the configuration, or by the state database."""
    registry = Registry()
    foreign = foreign_replicas(deployment.settings.replicas, dict(deployment.variants))
    with ports(deployment.settings.gateway) as taken:
        async with (
            Probe() as probe,
            Watch(foreign, registry, probe),
            others_replicas(deployment.wanted, registry, probe),
            gateway(deployment, registry, taken) as addresses,
        ):
            yield addresses


@asynccontextmanager
async def everything(
    deployment: Deployment, machine: Machine, registry: Registry, home: Path
) -> AsyncIterator[Addresses]:
    """Gateway and replicas on one machine; requests end before their replicas do."""
    foreign = foreign_replicas(deployment.settings.replicas, dict(deployment.variants))
    wanted = deployment.wanted
    with sole_owner(wanted, home) as owner, ports(deployment.settings.gateway) as taken:
        async with (
            Probe() as probe,
            own_replicas(wanted, machine, registry, probe, home, owner),
            Watch(foreign, registry, probe),
            gateway(deployment, registry, taken) as addresses,
        ):
            yield addresses
