"""Variants of a configuration: name, directory, precision and quality."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from config.errors import ManifestError
from config.golden import Golden, GoldenAnswer
from config.lora import Lora, lora_variant, read_lora
from config.manifest import FILE_NAME, Manifest
from config.quality import Quality
from config.quantization import precision_of
from config.schema import DeclaredQuality, Floor, LoraSettings, VariantSettings

_UNQUANTIZED_BITS = 16
MEASURES = tuple(Floor.model_fields)
# Measures for which higher is better; for all others, lower is.
AT_LEAST = frozenset({"top1_agreement"})
EXTERNAL = "external"  # the precision of models that other providers run
DTYPE_PRECISIONS = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


@dataclass(frozen=True, slots=True)
class QualityMeasures:
    """Quality relative to the parent; None is unknown, which does not meet any floor.

    `bounds` are the worse ends of the 95 % intervals, by measure: floors are held against them. Declared quality and
    that of older manifests has none.
    """

    source: Literal["measured", "declared", "parent", "unknown"]
    kl_mean: float | None = None
    top1_agreement: float | None = None
    perplexity_ratio: float | None = None
    kl_p99: float | None = None
    length_ratio: float | None = None
    bounds: Mapping[str, float] = field(default_factory=dict, hash=False)

    def bound(self, measure: str) -> float | None:
        """Return what a measure is at worst: the end of its interval, or the value itself without one."""
        value: float | None = getattr(self, measure)
        return self.bounds.get(measure, value)

    def shortfall(self, floor: Floor, *, trust_declared: bool = False) -> str | None:
        """Return why a floor is not met, or None if it is; declared values count only with `trust_declared`."""
        for measure in MEASURES:
            limit = getattr(floor, measure)
            if limit is None:
                continue
            value, bound = getattr(self, measure), self.bound(measure)
            if value is None or bound is None:
                return f"{measure} is unknown, the floor is {limit}"
            if (bound < limit) if measure in AT_LEAST else (bound > limit):
                return f"{measure} {self._described(measure)} misses the floor {limit}"
            if self.source == "declared" and not trust_declared:
                return f"{measure} {value:.4g} is declared, not measured (an alias can trust it: trust_declared)"
        return None

    def _described(self, measure: str) -> str:
        value, bound = getattr(self, measure), self.bound(measure)
        if value == bound:
            return f"{value:.4g}"
        side = "at least" if measure in AT_LEAST else "at most"
        return f"{value:.4g}, {side} {bound:.4g} with 95 % confidence,"


PARENT_QUALITY = QualityMeasures(
    "parent", kl_mean=0.0, top1_agreement=1.0, perplexity_ratio=1.0, kl_p99=0.0, length_ratio=1.0
)


@dataclass(frozen=True, slots=True)
class Variant:
    """A model of some precision; the aliases order variants on ladders.

    `loras` are its adapters. A variant that is an adapter (`lora`) has the precision and manifest of its base, which
    has failed its evaluation for both, and no path: the replicas of its base answer it.
    """

    name: str
    precision: str
    quality: QualityMeasures
    path: Path | None = None
    manifest: Manifest | None = None
    golden: GoldenAnswer | None = None
    loras: tuple[Lora, ...] = ()
    lora: Lora | None = None
    is_external: bool = field(init=False, repr=False, compare=False)  # another provider runs it

    def __post_init__(self) -> None:
        # Every decision reads it: a property would take longer.
        object.__setattr__(self, "is_external", self.precision == EXTERNAL)

    @property
    def names(self) -> frozenset[str]:
        """The names of the variants that its replicas answer: its own, and those of its adapters."""
        return frozenset([self.name, *(lora_variant(self.name, lora.name) for lora in self.loras)])

    @property
    def id(self) -> str:
        """The id in the manifest, or the configured name without a manifest."""
        return self.manifest.id if self.manifest else self.name

    @property
    def failure(self) -> str | None:
        """The limits that its evaluation missed, or None if its verdict is not "fail" or it has no manifest."""
        if self.manifest is None or self.manifest.quality.verdict != "fail":
            return None
        missed = [check for check in self.manifest.quality.checks if check.verdict == "fail"]
        limits = ", ".join(f"{check.name} {check.value:.4g} misses {check.limit:.4g}" for check in missed)
        return f"its verdict is fail: {limits}" if limits else "its verdict is fail"


def read_variants(
    settings: Mapping[str, VariantSettings],
    relative_to: Path,
    on_error: Callable[[tuple[str, ...], ManifestError], None] | None = None,
) -> dict[str, Variant]:
    """Read the manifests and adapters of all configured variants, by name; an adapter is a variant, too.

    Relative paths are resolved against `relative_to`, the directory of the configuration file. ManifestError if a
    directory is missing or its manifest is invalid; with `on_error`, it is called instead, with the location of the
    option below `variants`, and the variant or adapter is left out.
    """
    variants = {}
    for name, variant in settings.items():
        try:
            base = _read_variant(name, variant, relative_to)
        except ManifestError as error:
            if on_error is None:
                raise
            on_error((name, "path"), error)
            continue
        loras = tuple(_read_loras(name, variant, relative_to, on_error))
        variants[name] = replace(base, loras=loras)
    based = {name: _with_golden(variant, variants) for name, variant in variants.items()}
    return based | {
        adapter.name: adapter
        for name, base in based.items()
        for adapter in (_adapted(base, lora, settings[name].lora[lora.name]) for lora in base.loras)
    }


def _read_loras(
    name: str,
    settings: VariantSettings,
    relative_to: Path,
    on_error: Callable[[tuple[str, ...], ManifestError], None] | None,
) -> Iterator[Lora]:
    for adapter, lora in settings.lora.items():
        try:
            path = None if lora.path is None else _resolved(lora.path, relative_to)
            yield Lora(adapter) if path is None else read_lora(adapter, path)
        except ManifestError as error:
            if on_error is None:
                raise
            on_error((name, "lora", adapter), error)


def _adapted(base: Variant, lora: Lora, settings: LoraSettings) -> Variant:
    """Return the variant that an adapter is: on an unquantized base it is the reference for all others."""
    if settings.quality is not None:
        quality = _declared(settings.quality)
    else:
        quality = PARENT_QUALITY if base.quality.source == "parent" else QualityMeasures("unknown")
    name = lora_variant(base.name, lora.name)
    return Variant(name, base.precision, quality, manifest=base.manifest, lora=lora)


def measured_quality(quality: Quality) -> QualityMeasures:
    """Take the measures of floors from a manifest, each with the worse end of its interval."""
    values: dict[str, float | None] = {measure: getattr(quality, measure) for measure in MEASURES}
    bounds = {measure: quality.bound(measure, upper=measure not in AT_LEAST) for measure in quality.intervals}
    known = {measure: bound for measure, bound in bounds.items() if bound is not None and measure in MEASURES}
    return QualityMeasures("measured", **values, bounds=known)


def goldens(variants: Mapping[str, Variant]) -> dict[str, GoldenAnswer]:
    """Return the golden answers by variant, of the variants that have one."""
    return {name: variant.golden for name, variant in variants.items() if variant.golden}


def _with_golden(variant: Variant, variants: Mapping[str, Variant]) -> Variant:
    """Add the golden answer; that of a parent is recorded with a variant that was measured against it."""
    if variant.path is None:
        return variant
    if variant.manifest:
        own = Golden.read(variant.path)
        if own is None:
            return variant
        return replace(variant, golden=GoldenAnswer(own.ids, own.variant, own.parent, _is_exact(variant.manifest)))
    for other in variants.values():
        if other.path and other.manifest and other.manifest.base.name == variant.path.name:
            recorded = Golden.read(other.path)
            if recorded:
                exact, name = _is_exact(other.manifest), f"its variant {other.name}"
                golden = GoldenAnswer(recorded.ids, recorded.parent, recorded.variant, True, exact, name)
                return replace(variant, golden=golden)
    return variant


def _is_exact(manifest: Manifest) -> bool:
    return manifest.scheme.activation_bits >= _UNQUANTIZED_BITS


def _declared(quality: DeclaredQuality) -> QualityMeasures:
    return QualityMeasures("declared", **quality.model_dump())


def _resolved(path: str, relative_to: Path) -> Path:
    """Resolve a configured path; ManifestError for a name that is too long, a closed folder, an unknown ~user."""
    try:
        resolved = (relative_to / Path(path).expanduser()).resolve()
        resolved.exists()
    except (OSError, RuntimeError) as error:
        what = error.strerror if isinstance(error, OSError) else str(error)
        raise ManifestError(f"{path}: {what}; write the path of a model directory") from error
    return resolved


def _read_variant(name: str, settings: VariantSettings, relative_to: Path) -> Variant:
    if settings.path is None:
        quality = _declared(settings.quality) if settings.quality else QualityMeasures("unknown")
        return Variant(name, EXTERNAL if settings.external else settings.precision or "unknown", quality)
    path = _resolved(settings.path, relative_to)
    try:
        has_manifest = (path / FILE_NAME).exists()
    except OSError as error:
        raise ManifestError(f"{settings.path}: {error.strerror}; write the path of a model directory") from error
    if has_manifest:
        manifest = Manifest.read(path)
        quality = measured_quality(manifest.quality)
        return Variant(name, settings.precision or manifest.scheme.precision, quality, path, manifest)
    return _without_manifest(name, settings, path)


def _without_manifest(name: str, settings: VariantSettings, path: Path) -> Variant:
    """A directory without a manifest is a parent, or quantized and of unknown quality (`quantization_config`)."""
    config = read_model_config(path)
    quantization = config.get("quantization_config")
    if isinstance(quantization, dict):
        bits = quantization.get("bits")
        precision = settings.precision or precision_of(quantization) or (f"int{bits}" if bits else "unknown")
        return Variant(name, precision, QualityMeasures("unknown"), path)
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    return Variant(name, settings.precision or DTYPE_PRECISIONS.get(str(dtype), str(dtype)), PARENT_QUALITY, path)


def read_model_config(directory: Path) -> dict[str, Any]:
    """Read `config.json` of a model directory; ManifestError if it is missing or not a JSON object."""
    path = directory / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        problem = "has no config.json" if directory.is_dir() else "no such directory"
        raise ManifestError(f"{directory}: {problem}; write the path of a model directory") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ManifestError(f"{path}: is not readable JSON: {error}") from error
    if not isinstance(config, dict):
        raise ManifestError(f"{path}: is not a JSON object")
    return config
