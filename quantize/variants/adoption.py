"""Adoption: lint and evaluate a directory that another tool quantized, and write its manifest."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from config.manifest import FILE_NAME, Base, Manifest, Override, Quantizer, Scheme
from config.quality import Quality
from config.quantization import QuantizationScheme, kv_cache_of, schemes_of
from quantize.base import BaseModel, digest_of, slug
from quantize.errors import TargetError, VariantError
from quantize.schemes.scheme import named
from quantize.variants.artefact import Artefact, read_artefact
from quantize.variants.lint import lint, summary_of
from quantize.variants.lint_rules import Finding
from quantize.variants.storage_format import StorageFormat, configured_format, kind_of, quantized_layers
from quantize.variants.store import seal, sealed_files

# Checks whose findings are warnings. With any other, vLLM would fail or serve wrong results.
# `engine`: no vLLM that is supported has the format, but whatever serves it may.
_HARMLESS = frozenset({"quantize_config", "kept", "machine", "stray", "size", "engine"})
_READABLE_BITS = (4, 8)
_RECORDED_SETTINGS = ("damp_percent", "true_sequential", "static_groups")


def adopt(
    directory: Path,
    base: BaseModel,
    measure: Callable[[], Quality],
    warn: Callable[[str], None],
) -> Manifest:
    """Lint and evaluate a directory, and write its manifest; only that and the evaluation's files are added.

    `warn` gets the findings that are no obstacle. VariantError for findings with which vLLM would fail or serve wrong
    results, TargetError if there is a manifest already.
    """
    if (directory / FILE_NAME).exists():
        raise TargetError(f"{directory}: has a manifest already; nothing was changed")
    artefact = read_artefact(directory)
    scheme = scheme_told(artefact, base.shapes)
    findings = lint(directory, base, scheme)
    errors = serious(findings)
    if errors:
        raise VariantError(f"{directory}: cannot be adopted: {summary_of(errors)}")
    for finding in findings:
        warn(f"{directory}: {finding}")
    digest = digest_of({name: file.sha256 for name, file in sealed_files(directory).items()})
    quality = measure()
    return seal(
        directory,
        {
            "id": f"{slug(base.name)}-{scheme.precision}-{digest[:8]}",
            "base": Base(name=base.name, digest=base.digest, dtype=base.dtype),
            "scheme": scheme,
            "quantizer": maker(artefact),
            "quality": quality,
        },
    )


def serious(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """Select the findings with which vLLM would fail or serve wrong results."""
    return tuple(finding for finding in findings if finding.check not in _HARMLESS)


def scheme_told(artefact: Artefact, linear_layers: Mapping[str, tuple[int, int]]) -> Scheme:
    """Derive the scheme of a directory: the most common format of its layers, with overrides for the others.

    VariantError for an unsupported format.
    """
    config = artefact.quantization_config
    kind = kind_of(config)
    layers = quantized_layers(artefact.entries, kind) if kind else ()
    formats = {layer: stored for layer in layers if (stored := configured_format(config, layer))}
    if kind is None or not formats or any(stored.bits not in _READABLE_BITS for stored in formats.values()):
        what = f"{config.get('quant_method')} {config.get('format', '')}".strip()
        raise VariantError(
            f"{artefact.directory}: {what} layers are not supported; GPTQ, AWQ, compressed-tensors, FP8, bitsandbytes, "
            "NVFP4 and MXFP4 of 4 or 8 bits are"
        )
    common = _common_format(config, formats)
    described = _described_as(config, common)
    every = {layer: formats.get(layer) for layer in sorted({*linear_layers, *formats})} if kind != "mxfp4" else {}
    return named(
        Scheme(
            name="",
            compression=described.compression,
            weights=described.weights,
            input_activations=described.input_activations,
            kv_cache=kv_cache_of(config),
            overrides=exceptions(every, common),
        ),
    )


def _common_format(config: Mapping[str, Any], formats: Mapping[str, StorageFormat]) -> StorageFormat:
    """Return the format of most layers; a GPTQ configuration has defaults for all layers."""
    ((common, _),) = Counter(formats.values()).most_common(1)
    if common.kind == "gptq":
        return configured_format({**config, "dynamic": {}}, min(formats)) or common
    other = next((stored for stored in formats.values() if stored.type != common.type), None)
    if other is not None:
        raise VariantError(f"its layers are {common} and {other}; a variant has integers or floats, not both")
    return common


def _described_as(config: Mapping[str, Any], common: StorageFormat) -> QuantizationScheme:
    """Find the part of a configuration that describes layers of a format."""
    found = [scheme for scheme in schemes_of(config) if StorageFormat.of(scheme.compression, scheme.weights) == common]
    return found[0] if found else schemes_of(config)[0]


def exceptions(formats: Mapping[str, StorageFormat | None], common: StorageFormat) -> tuple[Override, ...]:
    """Return overrides for layers of another format than the common one: one pattern for all blocks that agree."""
    patterns: dict[str, StorageFormat | None] = {}
    for layer, storage_format in formats.items():
        if storage_format == common or any(fnmatchcase(layer, pattern) for pattern in patterns):
            continue
        wide = re.sub(r"(?<=\.)\d+(?=\.)", "*", layer)
        same = {other_format for other, other_format in formats.items() if fnmatchcase(other, wide)} == {storage_format}
        patterns[wide if same else layer] = storage_format
    return tuple(
        Override.model_validate(
            {
                "modules": pattern,
                "bits": storage_format and storage_format.bits,
                "group_size": storage_format and storage_format.group_size,
            },
        )
        for pattern, storage_format in patterns.items()
    )


def maker(artefact: Artefact) -> Quantizer:
    """Return the program that made a directory, as far as its configuration names it."""
    kind = kind_of(artefact.quantization_config)
    backend, version = _program(artefact.quantization_config)
    settings = {
        key: artefact.quantization_config[key]
        for key in _RECORDED_SETTINGS
        if isinstance(artefact.quantization_config.get(key), int | float)
    }
    layers = quantized_layers(artefact.entries, kind) if kind else ()
    return Quantizer(backend=backend, version=version, settings=settings, modules=len(layers))


def _program(config: Mapping[str, Any]) -> tuple[str, str]:
    """GPTQModel writes `meta.quantizer: ["gptqmodel:7.6.0"]`, compressed-tensors its own version, AutoGPTQ nothing."""
    meta = config.get("meta")
    programs = meta.get("quantizer") if isinstance(meta, dict) else None
    first = programs[0] if isinstance(programs, list) and programs else programs
    if isinstance(first, str) and ":" in first:
        name, _, version = first.partition(":")
        return name, version
    if config.get("quant_method") == "compressed-tensors":
        return "compressed-tensors", str(config.get("version") or "unknown")
    return "unknown", "unknown"
