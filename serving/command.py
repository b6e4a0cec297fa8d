"""Launch -> argv and environment of one vLLM server; pure, so a table test covers every rule.

Facts of vLLM 0.32 that shape it: the `vllm` command of the CPU wheel does not start, the module does; the first
served name is the one that answers carry; without limits a CPU replica claims 92 % of memory and core 0; missing
byte-code doubles the start time; SIGTERM aborts requests unless a shutdown timeout is given, and may hang over it.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from config.hardware import Core
from config.lora import engine_rank
from config.variant import Variant
from serving.cores import cpu_list
from serving.replica import Launch

VLLM_MODULE = ("-m", "vllm.entrypoints.openai.api_server")
CPU_KV_CACHE_BYTES = 512 * 2**20
# vLLM counts its teardown (4-6 s after the last token) against the timeout, and hangs when that ends with requests
# running. So the timeout lies beyond our own deadline, at which the whole session is killed.
SHUTDOWN_MARGIN_SECONDS = 30
LogFormat = Literal["plain", "json"]
# Adapters in one batch: vLLM reserves memory for each.
MAX_LORAS = 8
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
    cores: tuple[Core, ...] = ()
    preload: tuple[Path, ...] = ()
    log_format: LogFormat = "plain"


def build_command(launch: Launch, port: int, machine: Machine) -> Command:
    """Return the command that starts one replica on `127.0.0.1:port`."""
    # `vllm serve MODEL`, but only its module's parser knows `--model`.
    model = (str(launch.variant.path),) if machine.program[-1] == "serve" else ("--model", str(launch.variant.path))
    options = _arguments(launch, port, machine.log_format)
    argv = (machine.python, *machine.program, *model, *options, *launch.settings.args)
    return Command(argv, _environment(launch, machine))


def _arguments(launch: Launch, port: int, log_format: str) -> Sequence[str]:
    settings = launch.settings
    kv_cache_bytes = settings.kv_cache_bytes or (CPU_KV_CACHE_BYTES if launch.engine == "cpu" else None)
    options: list[tuple[str, object]] = [
        ("--host", "127.0.0.1"),
        ("--port", port),
        ("--dtype", settings.dtype),
        ("--tensor-parallel-size", settings.tensor_parallel),
        ("--pipeline-parallel-size", _if_several(settings.pipeline_parallel)),
        ("--data-parallel-size", _if_several(settings.data_parallel)),
        ("--max-model-len", settings.max_model_len),
        ("--max-num-seqs", settings.max_num_seqs),
        ("--max-num-queued-reqs", settings.max_queued),
        ("--kv-cache-memory-bytes", kv_cache_bytes),
        ("--kv-cache-dtype", None if settings.kv_cache_dtype == "auto" else settings.kv_cache_dtype),
        ("--speculative-config", None if settings.speculative is None else json.dumps(settings.speculative)),
        # Variants of one alias must not differ by what their checkpoints say about sampling.
        ("--generation-config", "vllm"),
        ("--reasoning-parser", launch.thinking.parser),
        ("--chat-template", launch.thinking.template),
        ("--shutdown-timeout", math.ceil(settings.drain_seconds) + SHUTDOWN_MARGIN_SECONDS),
        ("--default-chat-template-kwargs", _template_defaults(launch.thinking.enable_thinking)),
        ("--fingerprint-mode", "custom"),
        ("--fingerprint-value", launch.variant.id),
        ("--disable-access-log-for-endpoints", QUIET_ENDPOINTS),
        ("--logging-config.formatter", "json" if log_format == "json" else None),
    ]
    named = [text for flag, value in options if value is not None for text in (flag, str(value))]
    if launch.tool_parser is not None:
        named += ["--enable-auto-tool-choice", "--tool-call-parser", launch.tool_parser]
    switches = ["--enable-request-id-headers", "--enable-server-load-tracking", "--enable-prompt-tokens-details"]
    if not settings.prefix_caching:
        switches.append("--no-enable-prefix-caching")
    if settings.expert_parallel:
        switches.append("--enable-expert-parallel")
    switches += _lora_options(launch.variant)
    # The gateway refuses other URLs; without domains, all but `data:`.
    media = ["--allowed-media-domains", *launch.media_domains] if launch.media_domains else []
    return [*named, *media, *switches, "--served-model-name", launch.replica_id, launch.variant.name]


def _lora_options(variant: Variant) -> list[str]:
    """Serve the adapters of a variant; `--max-loras` in `args` changes how many of them one batch can mix."""
    modules = [f"{lora.name}={lora.path}" for lora in variant.loras if lora.path]
    if not modules:
        return []
    rank = engine_rank(max(lora.rank for lora in variant.loras))
    slots = min(len(modules), MAX_LORAS)
    return ["--enable-lora", "--max-lora-rank", str(rank), "--max-loras", str(slots), "--lora-modules", *modules]


def _if_several(ranks: int) -> int | None:
    return ranks if ranks > 1 else None


def _template_defaults(enable_thinking: bool | None) -> str | None:
    """Defaults of chat template variables, which the reasoning parser reads, too."""
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
    if launch.media_domains:
        # Otherwise a permitted domain could redirect to any other.
        environment.setdefault("VLLM_MEDIA_URL_ALLOW_REDIRECTS", "0")
    if launch.settings.api_key is not None:
        environment["VLLM_API_KEY"] = launch.settings.api_key.get_secret_value()
    if launch.engine == "cpu":
        return environment | _cpu_environment(launch, machine)
    # Numbers as in nvidia-smi; CUDA's own order is "fastest first".
    environment["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    if launch.gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, launch.gpus))
    return environment


def _cpu_environment(launch: Launch, machine: Machine) -> dict[str, str]:
    settings = launch.settings
    environment = {"VLLM_CPU_OMP_THREADS_BIND": settings.cores or launch.cores or _all_cores(launch, machine)}
    preload = [*map(str, machine.preload), *filter(None, [machine.environment.get("LD_PRELOAD")])]
    if preload:
        environment["LD_PRELOAD"] = ":".join(preload)
    return environment


def _all_cores(launch: Launch, machine: Machine) -> str:
    """Bind to every core, once per rank: vLLM's own choice would put all replicas on core 0."""
    cpus = [cpu for core in machine.cores for cpu in core.cpus] or range(machine.cpu_count)
    return "|".join([cpu_list(cpus)] * launch.settings.ranks)
