"""A configuration with everything that it refers to, read."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from config.schema import Settings
from config.variant import Variant
from gateway.keys import Keys, read_keys
from serving.app import Wanted, read_wanted
from serving.tls import Tls


@dataclass(frozen=True, slots=True)
class Deployment:
    """A configuration with everything that it refers to, read; `folder` is where it lies."""

    settings: Settings
    variants: Mapping[str, Variant]
    keys: Keys
    state: str | None = None  # where the state database is; None: neither told nor asked
    folder: Path = Path()
    tls: Mapping[int, Tls] = field(default_factory=dict)  # by the replica's place in the configuration

    @property
    def wanted(self) -> Wanted:
        """What serving needs to know of it."""
        return Wanted(self.settings, self.variants, self.state, self.folder, self.tls)


def read_deployment(path: Path) -> Deployment:
    """Read a configuration file, the manifests, keys and certificates it names; ConfigError if anything is wrong."""
    wanted = read_wanted(path)
    named = wanted.settings.gateway.keys
    keys = read_keys(path.parent / named) if named else Keys()
    return Deployment(wanted.settings, wanted.variants, keys, wanted.state, wanted.folder, wanted.tls)
