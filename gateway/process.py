"""What runs in one process: a gateway alone, or a gateway with its replicas; each follows its configuration file."""

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from config.schema import GatewaySettings, Settings
from config.variant import goldens
from gateway.app import NO_SOCKETS, Addresses, Gateway, gateway, listen_sockets, url_of
from gateway.deployment import Deployment
from gateway.handover import offered_to_successor
from gateway.http.sockets import ADMIN, CLIENT, InheritedSockets, ListenSockets, address_of
from gateway.keys.file_follower import KeyFileFollower
from gateway.reload import ConfigReload, FollowerReload, SupervisedReload
from gateway.workers import SINGLE_WORKER, WorkerIndex, handed_over_by_parent, with_worker_ports
from serving.app import discovered_replicas, followed_replicas, local_replicas, sole_owner
from serving.command import Machine
from serving.control import Controlled, ControlSocket
from serving.probe import Probe
from serving.readiness import verified_replicas
from serving.registry import Registry
from serving.reload import Reload
from serving.service_manager import ServiceManager
from serving.takeover import Predecessor
from serving.watch import Watch

NO_MANAGER = ServiceManager()


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

    def verified_replicas(self, registry: Registry, settings: Settings) -> AbstractAsyncContextManager[None]:
        """Wait for replicas on entry, if this process is to do so."""
        if not self.verified:
            return nullcontext()
        ready = self.predecessor.ready if self.predecessor else frozenset[str]()
        return verified_replicas(registry, ready, required=needs_replicas(settings))


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
            process.verified_replicas(registry, deployment.settings),
            gateway(deployment, registry, taken, place, discovery=discovery) as served,
            following(
                path,
                started,
                registry,
                served,
                FollowerReload(
                    watch, follower, registry, served.live_config, served.available_external, discovery=discovery
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
