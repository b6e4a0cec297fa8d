"""LoRA adapters of a variant: an adapter is a variant, too, and the replicas of its base variant answer it.

`lora: {math: PATH}` of the variant `qwq-int4` makes the variant `qwq-int4-math`. vLLM serves it under the name `math`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config.errors import ManifestError

# Values of --max-lora-rank (vllm/config/lora.py).
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# Initializations that leave the weights of the base model as they are (vllm/lora/peft_helper.py).
PLAIN_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica", "lora_ga"})
# Options of PEFT that change what an adapter computes, and that vLLM lacks.
UNSUPPORTED_OPTIONS = ("use_dora", "use_bdlora", "use_qalora", "alora_invocation_tokens", "layer_replication")
_CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")


@dataclass(frozen=True, slots=True)
class Lora:
    """A LoRA adapter: the name that engines serve it under, and the largest rank of its modules.

    `path` is None if only external replicas serve it; then the rank is unknown, 0.
    """

    name: str
    path: Path | None = None
    rank: int = 0


def lora_variant(base: str, adapter: str) -> str:
    """Return the name of the variant that an adapter of the variant `base` is."""
    return f"{base}-{adapter}"


def read_lora(name: str, path: Path) -> Lora:
    """Read an adapter in PEFT's format; ManifestError if it is not one, or if vLLM does not load it."""
    config = _read_config(path)
    if not any((path / file).is_file() for file in _WEIGHTS):
        raise ManifestError(f"{path}: has no {_WEIGHTS[0]}; write the directory of a LoRA adapter")
    if reason := unsupported(config):
        raise ManifestError(f"{path}: {reason}")
    return Lora(name, path, largest_rank(config))


def unsupported(config: Mapping[str, Any]) -> str | None:
    """Return why vLLM does not load an adapter with this `adapter_config.json`, or None (vllm/lora/peft_helper.py)."""
    if config.get("peft_type", "LORA") != "LORA":
        return f"peft_type {config['peft_type']} is not supported by vLLM; train a LoRA adapter"
    ranks = [config.get("r"), *(config.get("rank_pattern") or {}).values()]
    if not all(isinstance(rank, int) and 0 < rank <= LORA_RANKS[-1] for rank in ranks):
        return f"rank {ranks[0]} is not supported by vLLM; it must be from 1 to {LORA_RANKS[-1]}"
    if config.get("modules_to_save"):
        return "modules_to_save is not supported by vLLM; train the adapter without it"
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        return "an adapter with bias is not supported by vLLM; train it with bias: none"
    for option in UNSUPPORTED_OPTIONS:
        if config.get(option):
            return f"{option} is not supported by vLLM; train the adapter without it"
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in PLAIN_INITS:
        return f"init_lora_weights {init} changes the base model and is not supported by vLLM; convert the adapter"
    return None


def largest_rank(config: Mapping[str, Any]) -> int:
    """Return the largest rank of any module of an adapter."""
    return max(int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values()), 1)


def engine_rank(rank: int) -> int:
    """Return the smallest --max-lora-rank that holds adapters of a rank."""
    return next(each for each in LORA_RANKS if each >= rank)


def _read_config(path: Path) -> Mapping[str, Any]:
    try:
        config = json.loads((path / _CONFIG).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        problem = f"has no {_CONFIG}" if path.is_dir() else "no such directory"
        raise ManifestError(f"{path}: {problem}; write the directory of a LoRA adapter") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ManifestError(f"{path / _CONFIG}: is not readable JSON: {error}") from error
    if not isinstance(config, dict):
        raise ManifestError(f"{path / _CONFIG}: is not a JSON object")
    return config
