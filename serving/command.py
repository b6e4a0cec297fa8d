"""Launch -> argv and environment of one vLLM server; pure, so a table test covers every rule.

Facts of vLLM 0.32 that shape it: the `vllm` command of the CPU wheel does not start, the module does; the first
served name is the one that answers carry; without limits a CPU replica claims 92 % of memory and core 0; missing
byte-code doubles the start time.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from serving.replica import Launch

VLLM_MODULE = ("-m", "vllm.entrypoints.openai.api_server")
CPU_KV_CACHE_BYTES = 512 * 2**20
QUIET_ENDPOINTS = "/health,/metrics,/load,/v1/models"


@dataclass(frozen=True, slots=True)
class Command:
    """A program with its whole environment."""

    argv: tuple[str, ...]
    environment: dict[str, str]


@dataclass(frozen=True, slots=True)
class Machine:
    """What a command depends on besides the launch itself."""

    python: str
    cache_directory: Path
    cpu_count: int
    environment: Mapping[str, str]
    program: tuple[str, ...] = VLLM_MODULE


def build_command(launch: Launch, port: int, machine: Machine) -> Command:
    """Say how to start one replica on `127.0.0.1:port`."""
    argv = (machine.python, *machine.program, *_arguments(launch, port), *launch.settings.args)
    return Command(argv, _environment(launch, machine))


def _arguments(launch: Launch, port: int) -> Sequence[str]:
    settings = launch.settings
    kv_cache_bytes = settings.kv_cache_bytes or (CPU_KV_CACHE_BYTES if launch.engine == "cpu" else None)
    options: list[tuple[str, object]] = [
        ("--model", launch.variant.path),
        ("--host", "127.0.0.1"),
        ("--port", port),
        ("--dtype", settings.dtype),
        ("--tensor-parallel-size", settings.tensor_parallel),
        ("--max-model-len", settings.max_model_len),
        ("--max-num-seqs", settings.max_num_seqs),
        ("--max-num-queued-reqs", settings.max_queued),
        ("--kv-cache-memory-bytes", kv_cache_bytes),
        # Variants of one alias must not differ by what their checkpoints say about sampling.
        ("--generation-config", "vllm"),
        ("--reasoning-parser", launch.thinking.parser),
        ("--chat-template", launch.thinking.template),
        ("--default-chat-template-kwargs", _template_defaults(launch.thinking.enable_thinking)),
        ("--shutdown-timeout", round(settings.drain_seconds)),
        ("--fingerprint-mode", "custom"),
        ("--fingerprint-value", launch.variant.id),
        ("--disable-access-log-for-endpoints", QUIET_ENDPOINTS),
    ]
    named = [text for flag, value in options if value is not None for text in (flag, str(value))]
    switches = ["--enable-request-id-headers", "--enable-server-load-tracking", "--enable-prompt-tokens-details"]
    return [*named, *switches, "--served-model-name", launch.replica_id, launch.variant.name]


def _template_defaults(enable_thinking: bool | None) -> str | None:
    """The reasoning parser gets these, too: for a model that doesn't think unless told to, it must know."""
    return None if enable_thinking is None else json.dumps({"enable_thinking": enable_thinking})


def _environment(launch: Launch, machine: Machine) -> dict[str, str]:
    environment = {
        **machine.environment,
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        # Longer than the gateway keeps a connection idle, so that it never writes into one that is closing.
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "75",
        "VLLM_CACHE_ROOT": str(machine.cache_directory / "vllm"),
        "PYTHONPYCACHEPREFIX": str(machine.cache_directory / "bytecode"),
    }
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    environment.pop("VLLM_API_KEY", None)
    if launch.settings.api_key is not None:
        environment["VLLM_API_KEY"] = launch.settings.api_key.get_secret_value()
    if launch.engine == "cpu":
        environment["VLLM_CPU_OMP_THREADS_BIND"] = launch.settings.cores or _all_cores(launch, machine.cpu_count)
    elif launch.gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, launch.gpus))
    return environment


def _all_cores(launch: Launch, cpu_count: int) -> str:
    """Bind to every core, once per rank: vLLM's own choice would put all replicas on core 0."""
    return "|".join([f"0-{cpu_count - 1}" if cpu_count > 1 else "0"] * launch.settings.tensor_parallel)
