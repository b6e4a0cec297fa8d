"""A configuration with everything that it refers to, read."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from config.capacity import FILE_NAME, Setup, read_capacity
from config.schema import ReplicaSettings, Settings
from config.variant import Variant
from gateway.keys import Keys, read_keys
from gateway.routing.speed import SpeedProfile
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
    speeds: Mapping[str, SpeedProfile] = field(default_factory=dict)  # by variant, of those that were measured

    @property
    def wanted(self) -> Wanted:
        """What serving needs to know of it."""
        return Wanted(self.settings, self.variants, self.state, self.folder, self.tls)


def read_deployment(path: Path) -> Deployment:
    """Read a configuration file, the manifests, keys and certificates it names; ConfigError if anything is wrong."""
    wanted = read_wanted(path)
    named = wanted.settings.gateway.keys
    keys = read_keys(path.parent / named) if named else Keys()
    speeds = read_speeds(wanted.settings, wanted.variants)
    return Deployment(wanted.settings, wanted.variants, keys, wanted.state, wanted.folder, wanted.tls, speeds)


def read_speeds(settings: Settings, variants: Mapping[str, Variant]) -> dict[str, SpeedProfile]:
    """Read how fast variants were measured to be, where `capacity.json` tells; ConfigError if one can't be read.

    Of several measurements it is one with the launch settings of the configured replicas, or else the newest; how
    far a replica is from it is learned while it answers.
    """
    speeds = {}
    for name, variant in variants.items():
        if variant.path is None:
            continue
        measurements = read_capacity(variant.path / FILE_NAME).measurements
        launches = [replica for replica in settings.replicas if replica.variant == name]
        found = sorted(measurements, key=lambda each: (_fits(each.setup, launches), each.measured))
        speed = SpeedProfile.measured(found[-1]) if found else None
        if speed is not None:
            speeds[name] = speed
    return speeds


def _fits(setup: Setup, launches: Iterable[ReplicaSettings]) -> bool:
    measured = (setup.tensor_parallel, setup.max_num_seqs, setup.kv_cache_bytes, setup.dtype, setup.args)
    return any(
        measured == (each.tensor_parallel, each.max_num_seqs, each.kv_cache_bytes, each.dtype, each.args)
        for each in launches
    )
