"""Lint rules for the configuration, index, size and strings of a quantized directory; pure.

What vLLM loads is asked of `config.vllm`.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from config.manifest import Scheme
from config.quantization import Compression, QuantizationScheme, missing_keys, schemes_of
from config.vllm import inputs_of, loaded_anywhere, refusal, rows
from quantize.variants.artefact import Artefact
from quantize.variants.storage_format import kind_of

SIZE_TOLERANCE = 0.05
_METHODS = "GPTQ, AWQ, compressed-tensors, FP8, bitsandbytes, ModelOpt FP8 and NVFP4, MXFP4"
_LOCAL_PATH = re.compile(r"(^|[\s\"'=,;(])((/[\w.+@~-]+){2,}|[A-Za-z]:\\\w)")


@dataclass(frozen=True, slots=True)
class Finding:
    """A problem of a variant: the check that found it, the file or tensor, and the problem."""

    check: str
    where: str
    problem: str

    def __str__(self) -> str:
        return f"{self.check}: {self.where}: {self.problem}"


def config_findings(config: Mapping[str, Any], scheme: Scheme) -> Iterator[Finding]:
    """Compare a quantization_config with what vLLM loads on any engine, and with the scheme.

    The check `engine`: vLLM has no loader for the format at all.
    """
    where, kind = "config.json", kind_of(config)
    missing = missing_keys(config)
    yield from (Finding("config", where, f"has no {key}, which vLLM requires") for key in missing)
    if kind is None or missing:
        if not missing:
            yield Finding("config", where, f"{_described(config)} is not supported; supported are {_METHODS}")
        return
    for layers in schemes_of(config):
        if not loaded_anywhere(layers):
            check = "config" if rows(layers.compression, "cuda") else "engine"
            yield Finding(check, where, str(refusal(layers, "cuda")))
    if config.get("checkpoint_format", "gptq") not in ("gptq", None):
        yield Finding(
            "config",
            where,
            f"checkpoint_format is {config['checkpoint_format']}; save it as gptq, which any vLLM loads",
        )
    yield from _scheme_findings(config, scheme, kind)


def _scheme_findings(config: Mapping[str, Any], scheme: Scheme, kind: Compression) -> Iterator[Finding]:
    where = "config.json"
    if kind == "gptq":
        for key in ("bits", "group_size", "sym", "desc_act"):
            if config.get(key) != getattr(scheme, key):
                yield Finding("config", where, f"{key} is {config.get(key)}; the scheme has {getattr(scheme, key)}")
    inputs = {inputs_of(layers) for layers in schemes_of(config)}
    wanted = inputs_of(QuantizationScheme(scheme.compression, scheme.weights, scheme.input_activations))
    if kind != scheme.compression or wanted not in inputs:
        yield Finding("config", where, f"has {kind} weights; the scheme is {scheme.name} ({scheme.compression})")


def _described(config: Mapping[str, Any]) -> str:
    return f"{config.get('quant_method')} {config.get('format', '')}".strip()


def index_findings(artefact: Artefact) -> Iterator[Finding]:
    """Compare the index with the shards: each tensor is in exactly one file, the one in the index."""
    where = "model.safetensors.index.json"
    for name in artefact.duplicates:
        yield Finding("index", name, "is in more than one file")
    files = {name: entry.file.name for name, entry in artefact.entries.items()}
    if artefact.index is None:
        if len(set(files.values())) > 1:
            yield Finding("index", where, f"is missing, and there are {len(set(files.values()))} weight files")
        return
    for name in sorted(artefact.index.keys() | files.keys()):
        config, found = artefact.index.get(name), files.get(name)
        if config != found and name not in artefact.duplicates:
            yield Finding("index", name, f"is in {found or 'no file'}; the index has {config or 'no file'}")


def size_findings(weight_bytes: int, predicted_bytes: int) -> Iterator[Finding]:
    """Compare the size of the weights with the forecast."""
    off = weight_bytes / predicted_bytes - 1
    if abs(weight_bytes - predicted_bytes) > SIZE_TOLERANCE * predicted_bytes:
        config = f"{weight_bytes / 1e6:.1f} MB of weights; predicted are {predicted_bytes / 1e6:.1f} MB ({off:+.1%})"
        yield Finding("size", "*.safetensors", config)


def machine_findings(file: str, value: Any, hosts: Iterable[str], known: frozenset[str]) -> Iterator[Finding]:
    """Find local paths and host names in the strings of a JSON file, except the `known` strings of the parent."""
    names = [host for host in hosts if len(host) > 3 and host != "localhost"]
    for key, text in strings_of(value):
        # transformers writes there where a model was loaded from; nothing reads it, and variants don't have it.
        if text in known or key.rpartition(".")[2] == "_name_or_path":
            continue
        if _LOCAL_PATH.search(text):
            yield Finding("machine", file, f"{key} has a path of the machine that made it: {text[:80]}")
        elif any(re.search(rf"\b{re.escape(host)}\b", text) for host in names):
            yield Finding("machine", file, f"{key} has the name of the machine that made it")


def strings_of(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield every string of a JSON value with the path of its key."""
    if isinstance(value, str):
        yield key or "top level", value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from strings_of(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from strings_of(inner, key)
