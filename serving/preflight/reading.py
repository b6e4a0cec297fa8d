"""Reads the facts that the rules check: JSON files and sizes of a model directory, and this machine."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from config.hardware import read_cores, read_gpus, read_processor
from config.memory import read_memory
from config.variant import read_model_config
from serving.machine import port_is_free
from serving.preflight.facts import MachineFacts, ModelFacts
from serving.replica import Launch

# Instruction sets with a kernel for an FP8 KV cache (vllm/v1/attention/backends/cpu_attn.py).
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt")


def read_model(directory: Path) -> ModelFacts:
    """Read a model directory; ManifestError if it is not one."""
    config = read_model_config(directory)
    return ModelFacts(config, _weight_bytes(directory), _names(directory), _special_tokens(directory))


def read_machine(launches: Iterable[Launch]) -> MachineFacts:
    """Read the resources of this machine that these launches use."""
    launches = tuple(launches)
    gpus = read_gpus() if any(launch.engine == "cuda" for launch in launches) else ()
    nodes = len({core.node for core in read_cores()})
    busy = {launch.port for launch in launches if launch.port is not None and not port_is_free(launch.port)}
    return MachineFacts(read_memory().free_bytes, nodes, gpus, frozenset(busy), _flags())


def _flags() -> frozenset[str] | None:
    """Return the instruction sets of an x86 CPU; None: the table of formats names none of others."""
    processor = read_processor()
    return processor.flags if processor.architecture == "x86_64" else None


def _weight_bytes(directory: Path) -> int:
    """Size of the weights; of several formats only the first counts, as vLLM loads only that."""
    for pattern in _WEIGHTS:
        sizes = [path.stat().st_size for path in directory.glob(pattern) if path.is_file()]
        if sizes:
            return sum(sizes)
    return 0


def _names(directory: Path) -> frozenset[str]:
    return frozenset(path.name for path in directory.iterdir())


def _special_tokens(directory: Path) -> frozenset[str]:
    added = _json(directory / "tokenizer.json").get("added_tokens") or []
    return frozenset(str(token["content"]) for token in added if isinstance(token, dict) and "content" in token)


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
