"""The composition root: builds every object of the gateway and hands it on. Start reading here."""

import logging
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from socket import socket

from config.schema import GatewaySettings
from config.variant import goldens
from gateway.access_log import AccessLog
from gateway.admin import Shown, admin_app, guarded
from gateway.api.endpoint import InferenceEndpoint, Telling
from gateway.api.endpoints import ENDPOINTS
from gateway.api.routes import client_app
from gateway.api.site import Site
from gateway.deployment import Deployment, read_deployment
from gateway.fleet import FollowedFleet, OwnFleet, Take
from gateway.front.server import Front, serving_clients
from gateway.in_force import InForce
from gateway.listener import address_of, bind, listen
from gateway.metrics import EngineCollector, FleetCollector, LadderCollector, LoopLag, Metrics
from gateway.quota import Quota
from gateway.relay.dispatch import Dispatch
from gateway.relay.exchange import Relay
from gateway.relay.loads import Loads
from gateway.relay.polling import Polling
from gateway.relay.pool import Pool
from gateway.routing.catalog import Catalog
from gateway.routing.floors import shut_out, unanswerable
from gateway.tracing import tracing
from gateway.workers import ALONE, Place, placed
from serving.app import others_replicas, own_replicas, sole_owner
from serving.command import Machine
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
    in_force: InForce
    front: Front
    quota: Quota
    metrics: Metrics
    loads: Loads
    dispatch: Dispatch


@dataclass(frozen=True, slots=True)
class Ports:
    """Sockets that listen; connections wait in them until the server is there."""

    client: socket
    admin: socket


@contextmanager
def ports(settings: GatewaySettings, place: Place = ALONE) -> Iterator[Ports]:
    """Take both ports before anything that costs time is started; ConfigError if one is in use."""
    with (
        bind(settings.listen, "gateway.listen", shared=place.of > 1) as client,
        bind(settings.admin, "gateway.admin") as admin,
    ):
        yield Ports(client, admin)


@asynccontextmanager
async def gateway(
    deployment: Deployment, registry: Registry, taken: Ports, place: Place = ALONE
) -> AsyncIterator[Gateway]:
    """Serve clients and operators; when the block ends, running requests finish first."""
    in_force, metrics, quota = in_force_for(deployment), Metrics(), Quota(place.share)
    settings = deployment.settings.gateway
    async with AsyncExitStack() as stack:
        access_log = stack.enter_context(AccessLog(sys.stderr.buffer, settings.access_log, metrics.log_lines_dropped))
        traced = await stack.enter_async_context(tracing(settings.tracing))
        await stack.enter_async_context(LoopLag(metrics.loop_lag_seconds))
        pool = await stack.enter_async_context(Pool())
        loads = Loads(registry.in_flight, deployment.speeds)
        dispatch = stack.enter_context(Dispatch(registry, loads, metrics, settings.queue, settings.retries))
        # On connections of their own: polls and requests don't wait for each other.
        polls = await stack.enter_async_context(Pool())
        polling = await stack.enter_async_context(Polling(registry, polls, dispatch, metrics.polls))
        metrics.registry.register(
            FleetCollector(registry, in_force.variants, dispatch.breaker_states, dispatch.waiting)
        )
        metrics.registry.register(EngineCollector(registry, lambda: polling.seen))
        metrics.registry.register(LadderCollector(dispatch.scene.gates, lambda: iter(registry.ready), loads.outlooks))
        relay = Relay(dispatch, pool)
        told = Telling(metrics, access_log.line, traced)
        endpoints = {
            endpoint.path.encode(): InferenceEndpoint(endpoint, in_force, relay, quota, told)
            for endpoint in ENDPOINTS.values()
        }
        site = Site(endpoints, client_app(in_force, registry), in_force)
        shown = Shown(in_force, registry, metrics, site, dispatch)
        await stack.enter_async_context(listen(guarded(admin_app(shown), settings.admin_key), taken.admin))
        front = Front(site, settings.memory_bytes, cut=lambda reason: metrics.clients_cut.labels(reason).inc())
        await stack.enter_async_context(serving_clients(front, taken.client, settings.drain_seconds))
        addresses = Addresses(address_of(taken.client), address_of(taken.admin))
        log.info("listening on http://%s, admin on http://%s", addresses.client, addresses.admin)
        try:
            yield Gateway(addresses, in_force, front, quota, metrics, loads, dispatch)
        finally:
            site.draining = True


def in_force_for(deployment: Deployment) -> InForce:
    """What requests go by under a configuration; rungs and aliases that nothing can be had of are logged."""
    catalog = Catalog(deployment.settings.aliases, deployment.variants)
    for warning in (*shut_out(catalog), *unanswerable(catalog)):
        log.warning("%s", warning)
    return InForce(catalog, deployment.keys, deployment.settings.gateway.limits)


@asynccontextmanager
async def gateway_alone(
    deployment: Deployment, path: Path | None = None, place: Place = ALONE
) -> AsyncIterator[Addresses]:
    """The gateway in front of replicas that run elsewhere: told by the configuration, or by the state database.

    With a path, that file is followed.
    """
    registry = Registry()
    deployment = placed(deployment, place)
    wanted = deployment.wanted
    with ports(deployment.settings.gateway, place) as taken:
        async with (
            Probe() as probe,
            Watch(wanted.foreign, registry, probe, goldens(deployment.variants)) as watch,
            others_replicas(wanted, registry, probe) as follower,
            gateway(deployment, registry, taken, place) as served,
            following(path, served, FollowedFleet(watch, follower, registry, served.in_force).take),
        ):
            yield served.addresses


@asynccontextmanager
async def everything(
    deployment: Deployment, machine: Machine, registry: Registry, home: Path, path: Path | None = None
) -> AsyncIterator[Addresses]:
    """Gateway and replicas on one machine; requests end before their replicas do.

    With a path, that file is followed.
    """
    wanted = deployment.wanted
    with sole_owner(wanted, home) as owner, ports(deployment.settings.gateway) as taken:
        async with (
            Probe() as probe,
            own_replicas(wanted, machine, registry, probe, home, owner) as own,
            Watch(wanted.foreign, registry, probe, goldens(deployment.variants)) as watch,
            gateway(deployment, registry, taken) as served,
            following(path, served, OwnFleet(watch, own).take),
        ):
            yield served.addresses


@asynccontextmanager
async def following(path: Path | None, served: Gateway, take: Take) -> AsyncIterator[None]:
    """Take a configuration file over whenever it changes; None: it can't."""
    if path is None:
        yield
        return
    first = read_deployment(path)

    def files() -> list[Path]:
        keys = first.settings.gateway.keys
        return [path, path.parent / keys] if keys else [path]

    async def apply() -> None:
        deployment = read_deployment(path)
        for option in ("listen", "admin", "admin_key", "state", "keys", "access_log", "tracing"):
            if getattr(deployment.settings.gateway, option) != getattr(first.settings.gateway, option):
                log.warning("gateway.%s takes effect at the next start", option)

        def swap() -> None:
            served.in_force.take(in_force_for(deployment))
            served.loads.measured(deployment.speeds)
            served.dispatch.keep_only(served.in_force.catalog)
            served.quota.keep(deployment.keys.names())

        await take(deployment, swap)

    async with Reload(files, apply, lambda outcome: served.metrics.reloads.labels(outcome).inc()):
        yield
