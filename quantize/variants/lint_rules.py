"""Lint rules for the configuration, index, size and strings of a quantized directory; pure.

Rules of vLLM 0.32: auto_gptq.py and gptq_utils.py under vllm/model_executor/layers/quantization.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from config.manifest import Scheme
from quantize.variants.artefact import Artefact
from quantize.variants.storage_format import kind_of

SIZE_TOLERANCE = 0.05
_GROUP_SIZES = (-1, 32, 64, 128)
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
    """Compare a quantization_config with what vLLM accepts, and with the scheme."""
    where, kind = "config.json", kind_of(config)
    if kind is None:
        method = f"{config.get('quant_method')} {config.get('format', '')}".strip()
        yield Finding("config", where, f"{method} is not supported; supported are GPTQ and compressed-tensors")
        return
    if kind == "gptq":
        yield from (Finding("config", where, problem) for problem in _gptq_problems(config))
        wanted = {key: getattr(scheme, key) for key in ("bits", "group_size", "sym", "desc_act")}
        for key, value in wanted.items():
            if config.get(key) != value:
                yield Finding("config", where, f"{key} is {config.get(key)}; the scheme has {value}")
    elif any((group.get("weights") or {}).get("actorder") in ("group", "dynamic") for group in _groups(config)):
        yield Finding("config", where, "actorder is group; vLLM 0.32 does not support activation order across groups")
    activation_bits = 8 if kind == "int-quantized" else 16
    if scheme.activation_bits != activation_bits or (kind == "gptq") != (scheme.format == "gptq"):
        yield Finding("config", where, f"has {kind} weights; the scheme is {scheme.name} ({scheme.format})")


def _groups(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return list((config.get("config_groups") or {}).values())


def _gptq_problems(config: Mapping[str, Any]) -> Iterator[str]:
    for key in ("bits", "group_size", "sym", "desc_act"):
        if key not in config:
            yield f"has no {key}, which vLLM requires"
    if config.get("bits") not in (4, 8):
        yield f"bits is {config.get('bits')}; vLLM supports GPTQ with 4 or 8"
    if config.get("group_size") not in _GROUP_SIZES:
        yield f"group_size is {config.get('group_size')}; vLLM supports {', '.join(map(str, _GROUP_SIZES))}"
    if config.get("sym") is not True:
        yield "sym is not true; vLLM supports symmetric GPTQ only"
    rules = [change for pattern, change in (config.get("dynamic") or {}).items() if not pattern.startswith("-:")]
    for rule in ({}, *rules):
        merged = {**config, **rule}
        if merged.get("desc_act") and merged.get("group_size") != -1:
            yield "desc_act is true; vLLM 0.32 does not support activation order across groups"
            break
    if config.get("checkpoint_format", "gptq") not in ("gptq", None):
        yield f"checkpoint_format is {config['checkpoint_format']}; save it as gptq, which any vLLM supports"


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
