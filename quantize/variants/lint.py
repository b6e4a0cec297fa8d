"""The artefact lint: seconds that tell whether a directory is what its scheme, its parent and vLLM expect.

Nothing here loads a model: headers are read, and of the tensors only the scales, zero points and group indices.
"""

import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from config.manifest import FILE_NAME, Scheme
from quantize.base import BaseModel
from quantize.errors import VariantError
from quantize.model_files.kept_files import TOKENIZER_FILES, kept_files
from quantize.schemes.forecast import predicted_bytes
from quantize.variants.artefact import Artefact, read_artefact, read_object
from quantize.variants.lint_cache import cache_findings
from quantize.variants.lint_rules import (
    Finding,
    config_findings,
    index_findings,
    machine_findings,
    size_findings,
    strings_of,
)
from quantize.variants.lint_tensors import fused_findings, tensor_findings
from quantize.variants.lint_values import value_findings
from quantize.variants.quant_log import OLD_QUANT_LOG, QUANT_LOG
from quantize.variants.storage_format import kind_of

SIDECARS = (QUANT_LOG, OLD_QUANT_LOG, "evaluation.json")
_NAMES_SHOWN = 3
# Formats whose size `predicted_bytes` computes.
_FORECAST = frozenset({"gptq", "pack-quantized", "int-quantized", "float-quantized", "fp8"})
_EXPECTED = frozenset({"config.json", "model.safetensors.index.json", FILE_NAME, "capacity.json", *SIDECARS})
_COURTESIES = frozenset({"README.md", "LICENSE", ".gitattributes"})
# Text of samples: what looks like a path in it is the sample's.
_QUOTING = frozenset({"evaluation.json", FILE_NAME, "capacity.json"})


def lint(variant: Path, base: BaseModel | None, scheme: Scheme) -> tuple[Finding, ...]:
    """Check a quantized directory against its scheme and its base; no findings mean that it is in order.

    Without a base the checks that need one are left out. A directory that is no model is one finding.
    """
    try:
        artefact = read_artefact(variant)
    except VariantError as error:
        return (Finding("config", variant.name, str(error)),)
    return tuple(
        finding
        for findings in (
            config_findings(artefact.quantization_config, scheme),
            _twin_findings(artefact),
            index_findings(artefact),
            tensor_findings(artefact, base, scheme),
            fused_findings(artefact),
            value_findings(artefact),
            cache_findings(artefact, scheme),
            _size_findings(artefact, base, scheme),
            _kept_findings(variant, base.directory if base else None),
            _machine_findings(variant, base.config if base else {}),
            _stray_findings(artefact),
        )
        for finding in findings
    )


def require_clean(variant: Path, base: BaseModel | None, scheme: Scheme) -> None:
    """Raise VariantError that names what the lint found, if it found anything."""
    findings = lint(variant, base, scheme)
    if findings:
        raise VariantError(f"{variant.name}: the lint found {summary_of(findings)}")


def summary_of(findings: Sequence[Finding]) -> str:
    """Tell findings in one line: how many, and the first of them."""
    count = f"{len(findings)} problem{'s' if len(findings) > 1 else ''}"
    more = f"; and {len(findings) - _NAMES_SHOWN} more" if len(findings) > _NAMES_SHOWN else ""
    return f"{count}: {'; '.join(map(str, findings[:_NAMES_SHOWN]))}{more}"


def _twin_findings(artefact: Artefact) -> Iterator[Finding]:
    """GPTQ says it twice, for older servers: in config.json and in quantize_config.json."""
    where = "quantize_config.json"
    if kind_of(artefact.quantization_config) != "gptq":
        return
    try:
        twin = read_object(artefact.directory / where)
    except VariantError as error:
        yield Finding("quantize_config", where, str(error))
        return
    # AutoGPTQ leaves the method out of its own file, where only one is possible.
    differing = sorted(
        key
        for key in artefact.quantization_config.keys() | twin.keys()
        if artefact.quantization_config.get(key) != twin.get(key) and not (key == "quant_method" and key not in twin)
    )
    if differing:
        yield Finding("quantize_config", where, f"differs from config.json in {', '.join(differing)}")


def _size_findings(artefact: Artefact, base: BaseModel | None, scheme: Scheme) -> Iterator[Finding]:
    if base is not None and kind_of(artefact.quantization_config) in _FORECAST:
        yield from size_findings(artefact.weight_bytes, predicted_bytes(base, scheme))


def _kept_findings(variant: Path, base: Path | None) -> Iterator[Finding]:
    """Tokenizer, chat template, processor and code of its own must be the parent's, byte for byte."""
    if not any((variant / name).is_file() for name in TOKENIZER_FILES):
        yield Finding("tokenizer", variant.name, f"has none of {', '.join(TOKENIZER_FILES)}; copy them from its base")
    if base is None:
        return
    for name in sorted({path.name for path in (*kept_files(base), *kept_files(variant))}):
        theirs, ours = _bytes_of(base / name), _bytes_of(variant / name)
        if theirs is not None and ours is None:
            yield Finding("kept", name, "is in the base, and missing here")
        elif theirs is None and ours is not None:
            yield Finding("kept", name, "is not in the base")
        elif theirs != ours:
            yield Finding("kept", name, "differs from the base's; copy it from there")


def _machine_findings(variant: Path, base_config: Mapping[str, Any]) -> Iterator[Finding]:
    known = frozenset(text for _, text in strings_of(dict(base_config)))
    hosts = (socket.gethostname(),)
    kept = {path.name for path in kept_files(variant)}
    for file in sorted(variant.glob("*.json")):
        if file.name in _QUOTING or file.name in kept:
            continue
        try:
            value = read_object(file)
        except VariantError as error:
            yield Finding("stray", file.name, str(error))
            continue
        yield from machine_findings(file.name, value, hosts, known)


def _stray_findings(artefact: Artefact) -> Iterator[Finding]:
    weights = {entry.file.name for entry in artefact.entries.values()}
    twin = {"quantize_config.json"} if kind_of(artefact.quantization_config) == "gptq" else set()
    expected = _EXPECTED | _COURTESIES | weights | twin | {path.name for path in kept_files(artefact.directory)}
    for path in sorted(artefact.directory.iterdir()):
        if path.name not in expected and not (path.is_dir() and path.name.startswith(".")):
            yield Finding("stray", path.name, "is no part of a variant")


def _bytes_of(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None
