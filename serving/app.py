"""Composition root of the supervisor, and of what follows replicas of other processes."""

import logging
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

from config.errors import ReloadRefused, SettingsError
from config.load import load_settings_file, process_environment
from config.manifest import Engine
from config.reload_effects import pending_options
from config.schema import Settings
from config.variant import Variant, goldens
from serving.command import Machine
from serving.control import Controlled, ControlSocket
from serving.cores import NOTHING_BOUND, share_cores
from serving.engine_version import version_warning
from serving.errors import LaunchRefused, NoSuchReplica
from serving.kubernetes.access import ClusterAccess, cluster_access
from serving.kubernetes.discovery import Discovery
from serving.kubernetes.sources import PodSource, pod_sources
from serving.lock import sole_supervisor
from serving.machine import engine_distribution, installed_engine, installed_tool_parsers, installed_version
from serving.probe import Probe
from serving.process_ledger import ProcessLedger
from serving.progress import StateChanges
from serving.registry import Registry
from serving.reload import Reload
from serving.replica import Launch, Replica, State, external_replicas, own_keys, plan_launches
from serving.start_times import StartTimes
from serving.state.database import Owner, StateDatabase, state_url
from serving.state.demands import DemandFollower, with_demands
from serving.state.follower import Follower
from serving.state.link import Link
from serving.state.publisher import Publisher
from serving.state.rollout_records import Demand
from serving.supervisor import Supervisor
from serving.templates.plan import with_thinking
from serving.templates.tool_calling import with_tool_calling, without_tools
from serving.tls import Tls
from serving.validation import NamedFiles, read_named_files

log = logging.getLogger(__name__)

# Two parallel loads on few cores take longer than one after the other; on a GPU, loading waits for the disk.
PARALLEL_STARTS: Mapping[Engine, int] = {"cpu": 1, "cuda": 2}
SIGNALS = (
    "SIGTERM or Ctrl-C stops them after their running requests, SIGKILL leaves them running for the next start to adopt"
)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a configuration runs, and its folder; `state` is the URL of the state database, None for none."""

    settings: Settings
    variants: Mapping[str, Variant]
    state: str | None = None
    folder: Path = Path()
    tls: Mapping[int, Tls] = field(default_factory=dict)  # by the replica's position in the configuration

    @property
    def external(self) -> tuple[Replica, ...]:
        """The replicas with a `url`, which other programs run."""
        return external_replicas(self.settings.replicas, self.variants, self.tls)

    @property
    def pods(self) -> tuple[PodSource, ...]:
        """The entries with `kubernetes`, whose replicas are pods."""
        return pod_sources(self.settings.replicas, self.variants)

    def cluster_access(self) -> ClusterAccess:
        """Return the access to the cluster of the pods; OptionError: none is configured, and this is no pod."""
        return cluster_access(self.settings.gateway.kubernetes, self.folder, process_environment())

    @property
    def has_own_replicas(self) -> bool:
        """Whether a supervisor starts some replica, in this process or another."""
        return any(replica.supervised for replica in self.settings.replicas)


def read_wanted(path: Path) -> Wanted:
    """Read a configuration with its manifests and certificates; SettingsError lists all problems."""
    file = load_settings_file(path)
    named = read_named_files(file, path.parent)
    if named.problems:
        raise SettingsError(list(named.problems))
    return wanted_of(file.settings, named, path)


def wanted_of(settings: Settings, named: NamedFiles, path: Path) -> Wanted:
    """Return what the configuration file at `path` runs."""
    state = state_url(settings.gateway.state, path.parent)
    return Wanted(settings, named.variants, state, path.parent.resolve(), named.tls)


@asynccontextmanager
async def replicas_alone(
    wanted: Wanted, machine: Machine, registry: Registry, home: Path, path: Path | None = None
) -> AsyncIterator[None]:
    """Run this machine's replicas for gateways in other processes; with a path, reload that file when it changes."""
    if not wanted.has_own_replicas:
        raise LaunchRefused("the configuration has no replica to run here: all have a url or kubernetes")
    with sole_owner(wanted, home) as owner:
        async with (
            Probe() as probe,
            ControlSocket(home, Controlled("serve", path, registry)) as control,
            local_replicas(wanted, machine, registry, probe, home, owner) as own,
        ):
            control.restart = own.restart
            if path is None:
                yield
                return

            async def apply(confirmed: bool) -> None:
                changed = read_wanted(path)
                ready = any(status.state is State.READY for status in registry.snapshot())
                if ready and not changed.has_own_replicas and not confirmed:
                    raise ReloadRefused(f"{path}: no replica that runs here would remain")
                for option in pending_options(wanted.settings, changed.settings):
                    if option in ("serving", "gateway.state"):
                        log.warning("%s has changed; it takes effect at the next start", option)
                await own.update(changed)

            async with Reload(lambda: [path], apply) as reload:
                control.last_reload = lambda: reload.last
                yield


@contextmanager
def sole_owner(wanted: Wanted, home: Path) -> Iterator[Owner]:
    """Lock the home directory for one supervisor; LockHeld if another runs. Without replicas no lock is needed."""
    with sole_supervisor(home) if wanted.has_own_replicas else nullcontext("") as name:
        yield Owner(name, socket.gethostname(), os.getpid())


@asynccontextmanager
async def local_replicas(
    wanted: Wanted, machine: Machine, registry: Registry, probe: Probe, home: Path, owner: Owner
) -> AsyncIterator["LocalReplicas"]:
    """Supervise and publish the replicas of this machine, if the configuration has any."""
    if not wanted.has_own_replicas:
        yield LocalReplicas(machine)
        return
    engine, serving = installed_engine(), wanted.settings.serving
    warning = version_warning(installed_version(engine_distribution() or "") or "")
    if warning:
        log.warning("%s", warning)
    ledger = ProcessLedger(home / "running")
    demands = await DemandFollower.read(wanted.state)
    launches = planned_launches(wanted, machine, engine, demands.current)
    at_once = serving.parallel_starts or PARALLEL_STARTS[engine]
    log.info("starting %d replicas, %d at a time; %s", len(launches), at_once, SIGNALS)
    with StateChanges(registry, log.info):
        async with (
            published(wanted.state, owner, registry, external_ids(wanted), ledger) as publisher,
            Supervisor(
                launches,
                registry,
                replace(machine, log_format=serving.logs.format),
                probe,
                ledger,
                home / "logs",
                parallel_starts=at_once,
                start_attempts=serving.start_attempts,
                logs=serving.logs,
                traffic=publisher,
                start_times=StartTimes(home / "starts.json"),
            ) as supervisor,
        ):
            own = LocalReplicas(machine, engine, supervisor, publisher, demands, wanted)
            async with demands.applied(own.follow_demands):
                yield own


@dataclass(slots=True)
class LocalReplicas:
    """The supervisor and publisher of this machine's replicas; None where the configuration has none.

    `demands` are what rollouts want besides `wanted`, the configuration in force.
    """

    machine: Machine
    engine: Engine = "cpu"
    supervisor: Supervisor | None = None
    publisher: Publisher | None = None
    demands: DemandFollower = field(default_factory=DemandFollower)
    wanted: Wanted | None = None

    def restart(self, replica_id: str) -> str:
        """Restart a replica; see `Supervisor.restart`."""
        if self.supervisor is None:
            raise NoSuchReplica("the configuration has no replica to run here")
        return self.supervisor.restart(replica_id)

    async def update(self, wanted: Wanted, ready: Callable[[], None] = lambda: None) -> None:
        """Change to another configuration; see `Supervisor.update`."""
        if self.supervisor is None:
            if wanted.has_own_replicas:
                raise LaunchRefused("this process started without replicas; restart it to run some")
            ready()
            return
        if self.publisher is not None:
            self.publisher.external |= external_ids(wanted)
        self.wanted = wanted
        bound = self.supervisor.bound_cores()
        launches = planned_launches(wanted, self.machine, self.engine, self.demands.current, bound)
        await self.supervisor.update(launches, ready)

    async def follow_demands(self) -> None:
        """Change to what rollouts want now."""
        if self.wanted is not None:
            await self.update(self.wanted)


def external_ids(wanted: Wanted) -> frozenset[str]:
    """The ids of external replicas."""
    return frozenset(replica.id for replica in wanted.external)


def planned_launches(
    wanted: Wanted,
    machine: Machine,
    engine: Engine,
    demands: tuple[Demand, ...] = (),
    bound: Mapping[str, str] = NOTHING_BOUND,
) -> tuple[Launch, ...]:
    """Plan the launches of this machine: cores, chat templates and tool parsers included.

    `bound` has the cores of replicas that run, by id.
    """
    domains = wanted.settings.gateway.media_domains
    replicas = with_demands(wanted.settings.replicas, demands, wanted.variants)
    planned = plan_launches(replicas, dict(wanted.variants), engine)
    launches = tuple(replace(launch, media_domains=domains) for launch in planned)
    thinking = with_thinking(launches, wanted.settings.aliases, wanted.folder / "templates")
    with_tools = with_tool_calling(thinking, installed_tool_parsers())
    for notice in without_tools(with_tools):
        log.warning("%s", notice)
    return share_cores(with_tools, machine.cores, bound)


@asynccontextmanager
async def published(
    state: str | None, owner: Owner, registry: Registry, external: frozenset[str], ledger: ProcessLedger
) -> AsyncIterator[Publisher | None]:
    """Publish a registry to the state database, if there is one."""
    if state is None:
        yield None
        return
    link = Link(StateDatabase.at(state))
    async with Publisher(owner, registry, link, external, ledger.sessions) as publisher:
        yield publisher


@asynccontextmanager
async def followed_replicas(wanted: Wanted, registry: Registry, probe: Probe) -> AsyncIterator[Follower | None]:
    """Follow replicas of other processes, if the configuration has replicas to run or names a state database."""
    settings = wanted.settings
    if wanted.state is None or not (wanted.has_own_replicas or "state" in settings.gateway.model_fields_set):
        yield None
        return
    link = Link(StateDatabase.at(wanted.state))
    async with Follower(link, registry, probe, frozenset(wanted.variants), own_keys(settings.replicas)) as follower:
        yield follower


@asynccontextmanager
async def discovered_replicas(wanted: Wanted, registry: Registry, probe: Probe) -> AsyncIterator[Discovery]:
    """Find the replicas that run in a Kubernetes cluster; OptionError: there is no access to it."""
    async with Discovery(registry, probe, wanted.cluster_access) as discovery:
        await discovery.add(wanted.pods, goldens(wanted.variants))
        yield discovery
