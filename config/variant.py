"""A variant as serving and gateway see it: its directory, its precision, and the quality that somebody measured."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from config.errors import ManifestError
from config.golden import Golden, GoldenAnswer
from config.manifest import FILE_NAME, Manifest
from config.schema import Floor, VariantSettings

_WHOLE_ACTIVATIONS = 16
MEASURES = tuple(Floor.model_fields)
# What is better the higher it is; of all others, the lower.
AT_LEAST = frozenset({"top1_agreement"})
DTYPE_PRECISIONS = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


@dataclass(frozen=True, slots=True)
class QualityMeasures:
    """Distance from the parent; None is unknown, which satisfies no floor."""

    source: Literal["measured", "declared", "parent", "unknown"]
    kl_mean: float | None = None
    top1_agreement: float | None = None
    perplexity_ratio: float | None = None
    kl_p99: float | None = None
    length_ratio: float | None = None

    def shortfall(self, floor: Floor, *, trust_declared: bool = False) -> str | None:
        """Say which limit of a floor is missed, or None if all are met; declared figures count only where trusted."""
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
    """One rung: what it is called, where it lies, what precision it has and how good it is."""

    name: str
    precision: str
    quality: QualityMeasures
    path: Path | None = None
    manifest: Manifest | None = None
    golden: GoldenAnswer | None = None

    @property
    def id(self) -> str:
        """The sealed identity, or the configured name where there is no manifest."""
        return self.manifest.id if self.manifest else self.name

    @property
    def failure(self) -> str | None:
        """Say which limits its evaluation missed, or None if its verdict isn't fail, or nobody judged it."""
        if self.manifest is None or self.manifest.quality.verdict != "fail":
            return None
        missed = [check for check in self.manifest.quality.checks if not check.passed]
        limits = ", ".join(f"{check.name} {check.value:.4g} misses {check.limit:.4g}" for check in missed)
        return f"its verdict is fail: {limits}" if limits else "its verdict is fail"


def read_variants(settings: Mapping[str, VariantSettings], relative_to: Path) -> dict[str, Variant]:
    """Read every configured variant's manifest; relative paths count from the configuration file's folder.

    ManifestError: a directory is missing, or its manifest is broken.
    """
    found = {name: _read_variant(name, variant, relative_to) for name, variant in settings.items()}
    return {name: _with_golden(variant, found) for name, variant in found.items()}


def goldens(variants: Mapping[str, Variant]) -> dict[str, GoldenAnswer]:
    """What servers of variants must say, of those where that is known."""
    return {name: variant.golden for name, variant in variants.items() if variant.golden}


def _with_golden(variant: Variant, variants: Mapping[str, Variant]) -> Variant:
    """Add what a server of this variant must say; a parent's answer lies with those that were measured against it."""
    if variant.path is None:
        return variant
    if variant.manifest:
        own = Golden.read(variant.path)
        if own is None:
            return variant
        exact = variant.manifest.scheme.activation_bits >= _WHOLE_ACTIVATIONS
        return replace(variant, golden=GoldenAnswer(own.ids, own.variant, own.parent, exact))
    for other in variants.values():
        if other.path and other.manifest and other.manifest.base.name == variant.path.name:
            told = Golden.read(other.path)
            if told:
                return replace(variant, golden=GoldenAnswer(told.ids, told.parent))
    return variant


def _read_variant(name: str, settings: VariantSettings, relative_to: Path) -> Variant:
    if settings.path is None:
        declared = settings.quality
        quality = QualityMeasures("declared", **declared.model_dump()) if declared else QualityMeasures("unknown")
        return Variant(name, settings.precision or "unknown", quality)
    path = (relative_to / Path(settings.path).expanduser()).resolve()
    if (path / FILE_NAME).exists():
        manifest = Manifest.read(path)
        quality = QualityMeasures("measured", **{measure: getattr(manifest.quality, measure) for measure in MEASURES})
        return Variant(name, settings.precision or manifest.scheme.precision, quality, path, manifest)
    return _unsealed(name, settings, path)


def _unsealed(name: str, settings: VariantSettings, path: Path) -> Variant:
    """A directory without a manifest is a parent, unless somebody quantized it and nobody measured it."""
    config = read_model_config(path)
    if "quantization_config" in config:
        bits = config["quantization_config"].get("bits")
        precision = settings.precision or (f"int{bits}" if bits else "unknown")
        return Variant(name, precision, QualityMeasures("unknown"), path)
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    return Variant(name, settings.precision or DTYPE_PRECISIONS.get(dtype, dtype), PARENT_QUALITY, path)


def read_model_config(directory: Path) -> dict[str, Any]:
    """Read a model directory's `config.json`; ManifestError if it isn't one."""
    path = directory / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        what = "has no config.json" if directory.is_dir() else "no such directory"
        raise ManifestError(f"{directory}: {what}; a variant's path is a model directory") from None
    except (OSError, ValueError) as error:
        raise ManifestError(f"{path}: is not readable JSON: {error}") from error
    if not isinstance(config, dict):
        raise ManifestError(f"{path}: is not a JSON object")
    return config
