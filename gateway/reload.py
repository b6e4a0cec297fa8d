"""Applies a changed configuration to the replicas and then to requests, in an order that loses no request."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from config.errors import ReloadRefused
from config.load import load_settings
from config.reload_effects import pending_options
from config.schema import GatewaySettings, TlsSettings
from config.variant import goldens
from gateway.deployment import Deployment, read_deployment
from gateway.keys import Keys, read_keys
from gateway.live_config import LiveConfig, nothing_remains, unserved_aliases
from gateway.routing.target import Catalog
from serving.app import LocalReplicas
from serving.kubernetes.discovery import Discovery
from serving.registry import Registry
from serving.replica import CONFIGURATION, EXTERNAL_MODELS, KUBERNETES, SUPERVISOR, Replica, State, own_keys
from serving.state.follower import Follower
from serving.watch import Watch

log = logging.getLogger(__name__)

# Sources of replicas that the configuration decides on.
LOCAL = (SUPERVISOR, CONFIGURATION, KUBERNETES, EXTERNAL_MODELS)

# As long as a replica may take to start.
WAIT_SECONDS = 900.0

# Called with the new deployment and with a function that switches requests over to it.
ApplyDeployment = Callable[[Deployment, Callable[[], None]], Awaitable[None]]


@dataclass(slots=True)
class ConfigReload:
    """Reads a changed configuration and applies it to a running gateway.

    `started` is what the gateway was started with; `use_keys` gives requests other API keys, `switch` another
    configuration except for its keys. `with_recorded` adds the ladders and replicas that rollouts have recorded.
    """

    path: Path
    started: Deployment
    registry: Registry
    live_config: LiveConfig
    use_keys: Callable[[Keys], None]
    switch: Callable[[Deployment], None]
    apply_replicas: ApplyDeployment
    with_recorded: Callable[[Deployment], Deployment] = lambda deployment: deployment
    _keys_file: str | None = field(init=False)
    _tls: TlsSettings | None = field(init=False)
    _unread: GatewaySettings | None = None  # of a configuration whose files could not be read

    def __post_init__(self) -> None:
        self._keys_file, self._tls = self.started.settings.gateway.keys_file, self.started.settings.gateway.tls

    def files(self) -> list[Path]:
        """The files to follow: the configuration, its keys file, and the certificate of the clients' port.

        A configuration is read again when the files that it names are there.
        """
        named = _files(self._keys_file, self._tls)
        if self._unread is not None:
            named += _files(self._unread.keys_file, self._unread.tls)
        return [self.path, *(self.path.parent / name for name in named)]

    @property
    def keys_path(self) -> Path | None:
        """The keys file, if there is one."""
        return self.path.parent / self._keys_file if self._keys_file else None

    def apply_keys(self) -> None:
        """Read the keys file alone, and apply it: a key is revoked although the configuration is invalid, or waits.

        ConfigError if it is invalid; ReloadRefused if no API key in force would remain.
        """
        assert self.keys_path is not None
        keys = read_keys(self.keys_path)
        self._check_keys(self.keys_path, keys)
        self.use_keys(keys)

    async def apply(self, confirmed: bool) -> None:
        """Read the files and apply them, the API keys at once; ConfigError if they are invalid.

        ReloadRefused, unless `confirmed`, if nothing that answers now would remain, or no API key.
        """
        self._unread = load_settings(self.path).gateway
        deployment = self._with_keys(read_deployment(self.path))
        self._unread = None
        if not confirmed:
            self._check_remaining(self.with_recorded(deployment))
        for option in pending_options(self.started.settings, deployment.settings):
            log.warning("%s has changed; it takes effect at the next start", option)
        if (deployment.server_tls is None) != (self.started.server_tls is None):
            log.warning("gateway.tls is added or removed; it takes effect at the next start")
        self._tls = deployment.settings.gateway.tls
        self._keys_file = self._keys_file_of(deployment)
        self.use_keys(deployment.keys)
        # What rollouts want to run is not of this configuration: the supervisor follows that by itself.
        recorded, replicas = self.with_recorded(deployment), {"replicas": deployment.settings.replicas}
        applied = replace(recorded, settings=recorded.settings.model_copy(update=replicas))
        await self.apply_replicas(applied, lambda: self.switch(deployment))

    def _with_keys(self, deployment: Deployment) -> Deployment:
        """Keep the keys file if the option is removed: the port may be open to other machines.

        Whether keys are in a file or in the state database changes at the next start only.
        """
        gateway, in_database = deployment.settings.gateway, self.started.settings.gateway.keys_in_database
        is_moved = in_database != gateway.keys_in_database
        if is_moved:
            log.warning("gateway.keys has changed from or to `database`; it takes effect at the next start")
        if in_database or (is_moved and self._keys_file is None):
            return replace(deployment, keys=self.live_config.keys)
        if gateway.keys_file or self._keys_file is None:
            return deployment
        if not is_moved:
            log.warning("gateway.keys is removed; %s stays in force until the next start", self._keys_file)
        return replace(deployment, keys=read_keys(self.path.parent / self._keys_file))

    def _keys_file_of(self, deployment: Deployment) -> str | None:
        if self.started.settings.gateway.keys_in_database:
            return None
        return deployment.settings.gateway.keys_file or self._keys_file

    def _check_remaining(self, deployment: Deployment) -> None:
        after = Catalog(deployment.settings.aliases, deployment.variants)
        statuses = self.registry.snapshot()
        ready = {name for status in statuses if status.state is State.READY for name in status.replica.variants}
        others = [status.replica for status in statuses if status.source not in LOCAL]
        wanted = deployment.settings.served_variants.union(*(replica.variants for replica in others))
        if reason := nothing_remains(self.live_config.catalog, after, ready, wanted):
            raise ReloadRefused(f"{self.path}: {reason}")
        self._check_keys(self.path.parent / (deployment.settings.gateway.keys or ""), deployment.keys)

    def _check_keys(self, path: Path, keys: Keys) -> None:
        if self.live_config.keys.replaced_by(keys):
            raise ReloadRefused(f"{path}: none of the API keys in force would remain")


def _files(keys_file: str | None, tls: TlsSettings | None) -> list[str]:
    return [name for name in (keys_file, *((tls.certificate, tls.key_file) if tls else ())) if name]


def no_external_models(_: Deployment) -> Collection[str]:
    """No external variants: what a process without litellm can ask."""
    return ()


@dataclass(frozen=True, slots=True)
class SupervisedReload:
    """Reload where this process runs the replicas, beside external ones (`url`, `kubernetes`)."""

    watch: Watch
    own: LocalReplicas
    discovery: Discovery

    async def apply(self, deployment: Deployment, swap: Callable[[], None]) -> None:
        """Start new replicas, call `swap` when they are ready, then stop the old ones."""
        external, pods = deployment.wanted.external, deployment.wanted.pods
        await self.discovery.add(pods, goldens(deployment.variants))
        self.watch.goldens = goldens(deployment.variants)
        self.watch.prepare(external)

        def switch() -> None:
            swap()
            self.watch.keep_only(external)
            self.discovery.keep_only(pods)

        await self.own.update(deployment.wanted, switch)


@dataclass(frozen=True, slots=True)
class FollowerReload:
    """Reload where other processes run the replicas and decide when they start and stop.

    `external_models` are the external variants of a configuration that requests can be sent to as soon as it is in use.
    """

    watch: Watch
    follower: Follower | None
    registry: Registry
    live_config: LiveConfig
    external_models: Callable[[Deployment], Collection[str]] = no_external_models
    wait_seconds: float = WAIT_SECONDS
    discovery: Discovery | None = None

    async def apply(self, deployment: Deployment, swap: Callable[[], None]) -> None:
        """Call `swap` as soon as no alias would lose its last ready replica, or after `wait_seconds`."""
        external, pods = deployment.wanted.external, deployment.wanted.pods
        if self.discovery is not None:
            await self.discovery.add(pods, goldens(deployment.variants))
        self.watch.goldens = goldens(deployment.variants)
        self.watch.prepare(external)
        if self.follower is not None:
            keys = {**self.follower.keys, **own_keys(deployment.settings.replicas)}
            self.follower.admit(self.follower.variants | frozenset(deployment.variants), keys)
        after = Catalog(deployment.settings.aliases, deployment.variants)
        await self._wait_until_served(after, deployment)
        swap()
        if self.follower is not None:
            self.follower.admit(frozenset(deployment.variants), own_keys(deployment.settings.replicas))
        self.watch.keep_only(external)
        if self.discovery is not None:
            self.discovery.keep_only(pods)

    async def _wait_until_served(self, after: Catalog, deployment: Deployment) -> None:
        before, external = self.live_config.catalog, frozenset(self.external_models(deployment))
        changed, logged = asyncio.Event(), False
        try:
            with ExitStack() as stack:
                for registry in (self.registry, *self._successors()):
                    stack.enter_context(registry.observed(changed.set))
                async with asyncio.timeout(self.wait_seconds):
                    while unserved := unserved_aliases(
                        before,
                        after,
                        self._ready_variants() | external,
                        self._remaining_variants(deployment) | external,
                    ):
                        if not logged:
                            names = ", ".join(unserved)
                            log.info("reload waits for ready replicas of the new configuration for %s", names)
                            logged = True
                        await changed.wait()
                        changed.clear()
        except TimeoutError:
            names = ", ".join(unserved)
            log.warning("no ready replica for %s after %g s; applying the configuration", names, self.wait_seconds)

    def _successors(self) -> tuple[Registry, ...]:
        found = self.discovery.successors if self.discovery is not None else None
        return (self.watch.successors,) if found is None else (self.watch.successors, found)

    def _ready_variants(self) -> set[str]:
        return {name for replica in _ready(self.registry) for name in replica.variants}

    def _remaining_variants(self, deployment: Deployment) -> set[str]:
        """Return the ready variants, without replicas that others of their variant are about to replace."""
        wanted = deployment.wanted
        replaced = {each.variant for each in wanted.external} | {each.pod.variant for each in wanted.pods}
        leaving = self.watch.leaving(wanted.external) | (self.discovery.leaving() if self.discovery else set())
        staying = [each for each in _ready(self.registry) if each.id not in leaving or each.variant not in replaced]
        coming = [each for registry in self._successors() for each in _ready(registry)]
        return {name for replica in (*staying, *coming) for name in replica.variants}


def _ready(registry: Registry) -> list[Replica]:
    return [status.replica for status in registry.snapshot() if status.state is State.READY]
