"""Variants of a configuration: name, directory, precision and quality."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from config.errors import ManifestError
from config.golden import Golden, GoldenAnswer
from config.manifest import FILE_NAME, Manifest
from config.quantization import precision_of
from config.schema import Floor, VariantSettings

_UNQUANTIZED_BITS = 16
MEASURES = tuple(Floor.model_fields)
# Measures for which higher is better; for all others, lower is.
AT_LEAST = frozenset({"top1_agreement"})
DTYPE_PRECISIONS = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


@dataclass(frozen=True, slots=True)
class QualityMeasures:
    """Quality relative to the parent; None is unknown, which does not meet any floor."""

    source: Literal["measured", "declared", "parent", "unknown"]
    kl_mean: float | None = None
    top1_agreement: float | None = None
    perplexity_ratio: float | None = None
    kl_p99: float | None = None
    length_ratio: float | None = None

    def shortfall(self, floor: Floor, *, trust_declared: bool = False) -> str | None:
        """Return why a floor is not met, or None if it is; declared values count only with `trust_declared`."""
        for measure in MEASURES:
            limit = getattr(floor, measure)
            if limit is None:
                continue
            value = getattr(self, measure)
            if value is None:
                return f"{measure} is unknown, the floor is {limit}"
            if (value < limit) if measure in AT_LEAST else (value > limit):
                return f"{measure} {value:.4g} misses the floor {limit}"
            if self.source == "declared" and not trust_declared:
                return f"{measure} {value:.4g} is declared, not measured (an alias can trust it: trust_declared)"
        return None


PARENT_QUALITY = QualityMeasures(
    "parent", kl_mean=0.0, top1_agreement=1.0, perplexity_ratio=1.0, kl_p99=0.0, length_ratio=1.0
)


@dataclass(frozen=True, slots=True)
class Variant:
    """A model of some precision; the aliases order variants on ladders."""

    name: str
    precision: str
    quality: QualityMeasures
    path: Path | None = None
    manifest: Manifest | None = None
    golden: GoldenAnswer | None = None

    @property
    def id(self) -> str:
        """The id in the manifest, or the configured name without a manifest."""
        return self.manifest.id if self.manifest else self.name

    @property
    def failure(self) -> str | None:
        """The limits that its evaluation missed, or None if its verdict is not "fail" or it has no manifest."""
        if self.manifest is None or self.manifest.quality.verdict != "fail":
            return None
        missed = [check for check in self.manifest.quality.checks if not check.passed]
        limits = ", ".join(f"{check.name} {check.value:.4g} misses {check.limit:.4g}" for check in missed)
        return f"its verdict is fail: {limits}" if limits else "its verdict is fail"


def read_variants(
    settings: Mapping[str, VariantSettings],
    relative_to: Path,
    on_error: Callable[[str, ManifestError], None] | None = None,
) -> dict[str, Variant]:
    """Read the manifests of all configured variants, by name.

    Relative paths are resolved against `relative_to`, the directory of the configuration file. ManifestError if a
    directory is missing or its manifest is invalid; with `on_error`, it is called instead, and the variant is left out.
    """
    variants = {}
    for name, variant in settings.items():
        try:
            variants[name] = _read_variant(name, variant, relative_to)
        except ManifestError as error:
            if on_error is None:
                raise
            on_error(name, error)
    return {name: _with_golden(variant, variants) for name, variant in variants.items()}


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


def _read_variant(name: str, settings: VariantSettings, relative_to: Path) -> Variant:
    if settings.path is None:
        declared = settings.quality
        quality = QualityMeasures("declared", **declared.model_dump()) if declared else QualityMeasures("unknown")
        return Variant(name, settings.precision or "unknown", quality)
    try:
        path = (relative_to / Path(settings.path).expanduser()).resolve()
        has_manifest = (path / FILE_NAME).exists()
    except (OSError, RuntimeError) as error:  # a name that is too long, a folder that is closed, an unknown ~user
        what = error.strerror if isinstance(error, OSError) else str(error)
        raise ManifestError(f"{settings.path}: {what}; write the path of a model directory") from error
    if has_manifest:
        manifest = Manifest.read(path)
        quality = QualityMeasures("measured", **{measure: getattr(manifest.quality, measure) for measure in MEASURES})
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
