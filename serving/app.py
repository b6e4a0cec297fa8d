"""Puts together what runs replicas, and what follows those of other processes."""

import logging
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

from config.load import load_settings
from config.manifest import Engine
from config.schema import Settings
from config.variant import Variant, read_variants
from serving.backoff import Backoff
from serving.command import Machine
from serving.cores import share_cores
from serving.engine_version import version_warning
from serving.errors import LaunchRefused
from serving.lock import sole_supervisor
from serving.machine import engine_distribution, installed_engine, installed_version
from serving.notebook import Notebook
from serving.probe import Probe
from serving.registry import Registry
from serving.reload import Reload
from serving.replica import Launch, Replica, foreign_replicas, own_keys, plan_launches
from serving.state.database import Owner, StateDatabase, state_url
from serving.state.follower import Follower
from serving.state.link import Link
from serving.state.publisher import Publisher
from serving.supervisor import Supervisor
from serving.templates.plan import with_thinking
from serving.tls import Tls, read_tls

log = logging.getLogger(__name__)

# Two that load on few cores take longer than one after the other; a GPU's load waits for its disk.
PARALLEL_STARTS: Mapping[Engine, int] = {"cpu": 1, "cuda": 2}


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a configuration wants to run, and the folder it lies in.

    `state` is the address of the state database; None: tell nobody.
    """

    settings: Settings
    variants: Mapping[str, Variant]
    state: str | None = None
    folder: Path = Path()
    tls: Mapping[int, Tls] = field(default_factory=dict)  # by the replica's place in the configuration

    @property
    def foreign(self) -> tuple[Replica, ...]:
        """The replicas that somebody else runs."""
        return foreign_replicas(self.settings.replicas, self.variants, self.tls)

    @property
    def has_own_replicas(self) -> bool:
        """Whether some replica is to be started by us, here or in another process."""
        return any(replica.url is None for replica in self.settings.replicas)


def read_wanted(path: Path) -> Wanted:
    """Read a configuration file, and the manifests and certificates it names; ConfigError if anything is wrong."""
    settings = load_settings(path)
    variants = read_variants(settings.variants, path.parent)
    tls = read_tls(settings.replicas, path.parent)
    return Wanted(settings, variants, state_url(settings.gateway.state, path.parent), path.parent.resolve(), tls)


@asynccontextmanager
async def replicas_alone(
    wanted: Wanted, machine: Machine, registry: Registry, home: Path, path: Path | None = None
) -> AsyncIterator[None]:
    """Run this machine's replicas for gateways in other processes; with a path, that file is followed."""
    if not wanted.has_own_replicas:
        raise LaunchRefused("the configuration has no replica to run here; one without url is ours to run")
    with sole_owner(wanted, home) as owner:
        async with Probe() as probe, own_replicas(wanted, machine, registry, probe, home, owner) as own:
            if path is None:
                yield
                return

            async def apply() -> None:
                await own.update(read_wanted(path))

            async with Reload(lambda: [path], apply):
                yield


@contextmanager
def sole_owner(wanted: Wanted, home: Path) -> Iterator[Owner]:
    """Be the one supervisor of a home directory; LockHeld if there is one. Who runs no replicas needs no lock."""
    with sole_supervisor(home) if wanted.has_own_replicas else nullcontext("") as name:
        yield Owner(name, socket.gethostname(), os.getpid())


@asynccontextmanager
async def own_replicas(
    wanted: Wanted, machine: Machine, registry: Registry, probe: Probe, home: Path, owner: Owner
) -> AsyncIterator["OwnReplicas"]:
    """Start what is to run on this machine and tell the state database; without any, nothing is touched."""
    if not wanted.has_own_replicas:
        yield OwnReplicas(machine)
        return
    engine, serving = installed_engine(), wanted.settings.serving
    warning = version_warning(installed_version(engine_distribution() or "") or "")
    if warning:
        log.warning("%s", warning)
    notebook = Notebook(home / "running")
    async with (
        told(wanted.state, owner, registry, foreign_ids(wanted), notebook) as publisher,
        Supervisor(
            planned_launches(wanted, machine, engine),
            registry,
            replace(machine, log_format=serving.logs.format),
            probe,
            notebook,
            home / "logs",
            parallel_starts=serving.parallel_starts or PARALLEL_STARTS[engine],
            backoff=Backoff(start_failures=serving.start_attempts),
            logs=serving.logs,
            rotation=publisher,
        ) as supervisor,
    ):
        yield OwnReplicas(machine, engine, supervisor, publisher)


@dataclass(frozen=True, slots=True)
class OwnReplicas:
    """What runs the replicas of this machine, and tells of them; no supervisor where the configuration has none."""

    machine: Machine
    engine: Engine = "cpu"
    supervisor: Supervisor | None = None
    publisher: Publisher | None = None

    async def update(self, wanted: Wanted, ready: Callable[[], None] = lambda: None) -> None:
        """Go over to what is wanted now; see `Supervisor.update`."""
        if self.supervisor is None:
            if wanted.has_own_replicas:
                raise LaunchRefused("there were no replicas to run here when we started; start again to run some")
            ready()
            return
        if self.publisher is not None:
            self.publisher.foreign |= foreign_ids(wanted)
        await self.supervisor.update(planned_launches(wanted, self.machine, self.engine), ready)


def foreign_ids(wanted: Wanted) -> frozenset[str]:
    """The ids of the replicas that somebody else runs."""
    return frozenset(each.id for each in wanted.foreign)


def planned_launches(wanted: Wanted, machine: Machine, engine: Engine) -> tuple[Launch, ...]:
    """Spread what is wanted into servers of this machine, each with its share of it."""
    domains = wanted.settings.gateway.media_domains
    planned = plan_launches(wanted.settings.replicas, dict(wanted.variants), engine)
    launches = tuple(replace(launch, media_domains=domains) for launch in planned)
    thinking = with_thinking(launches, wanted.settings.aliases, wanted.folder / "templates")
    return share_cores(thinking, machine.cores)


@asynccontextmanager
async def told(
    state: str | None, owner: Owner, registry: Registry, foreign: frozenset[str], notebook: Notebook
) -> AsyncIterator[Publisher | None]:
    """Mirror a registry into the state database, if there is to be one."""
    if state is None:
        yield None
        return
    link = Link(StateDatabase.at(state))
    async with Publisher(owner, registry, link, foreign, notebook.sessions) as publisher:
        yield publisher


@asynccontextmanager
async def others_replicas(wanted: Wanted, registry: Registry, probe: Probe) -> AsyncIterator[Follower | None]:
    """Follow what other processes run, if the configuration has such replicas, or says where they are told of."""
    settings = wanted.settings
    if wanted.state is None or not (wanted.has_own_replicas or "state" in settings.gateway.model_fields_set):
        yield None
        return
    link = Link(StateDatabase.at(wanted.state))
    async with Follower(link, registry, probe, frozenset(wanted.variants), own_keys(settings.replicas)) as follower:
        yield follower
