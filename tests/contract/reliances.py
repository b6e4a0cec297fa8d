"""Everything that quantgate relies on in vLLM. Where the product has a table of it, that table is read.

A reliance has a kind, a name, and the part of quantgate that breaks without it.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal, get_args

from config.lora import LORA_RANKS, PLAIN_INITS, UNSUPPORTED_OPTIONS, Lora
from config.reserved_flags import RESERVED_FLAGS
from config.schema import ReplicaSettings
from config.variant import PARENT_QUALITY, Variant
from config.vllm import SUPPORTED, KvCacheDtype
from deploy.grafana.queries import ENGINE_METRICS
from gateway.openai.endpoints import CHAT, COMPLETIONS, ENDPOINTS, MESSAGES, RESPONSES
from gateway.openai.limits import GUARDED_FIELDS
from gateway.openai.response import CONTEXT_LENGTH_EXCEEDED
from gateway.routing.engine_metrics import CACHE_INFO, WANTED
from serving.command import Command, Machine, build_command
from serving.replica import Launch, Thinking
from serving.templates.plan import PARSER, PARSERS_OF_TOKENS
from serving.templates.tool_calling import TOOL_FORMATS
from tests.contract.sources import Sources

Kind = Literal[
    "flag",
    "variable",
    "metric",
    "label",
    "endpoint",
    "field",
    "tool parser",
    "reasoning parser",
    "name",
    "text",
    "file",
]

LAUNCH = Launch(
    "int4-1",
    Variant("int4", "int4", PARENT_QUALITY, Path("/models/int4"), loras=(Lora("math", Path("/adapters/math"), 8),)),
    "cpu",
    ReplicaSettings(
        variant="int4",
        dtype="bfloat16",
        tensor_parallel=2,
        pipeline_parallel=2,
        data_parallel=2,
        expert_parallel=True,
        kv_cache_dtype="fp8",
        speculative={"method": "ngram", "num_speculative_tokens": 4},
        max_model_len=4096,
        max_num_seqs=8,
        max_queued=16,
        kv_cache_bytes="1GiB",
        prefix_caching=False,
        api_key="key",
    ),
    thinking=Thinking(PARSER, Path("/think.jinja"), enable_thinking=False),
    tool_parser="hermes",
    media_domains=("images.example",),
)
# Set for other programs than vLLM, or read by it through another library.
FOREIGN_VARIABLES = frozenset(
    {"DO_NOT_TRACK", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "PYTHONPYCACHEPREFIX", "LD_PRELOAD"}
)
# Of older versions; guarded in case that somebody runs one.
OLD_FIELDS = frozenset({"logits_processors", "guided_decoding_backend"})

# Request models by endpoint: what the gateway reads or adds there.
REQUEST_FIELDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "ChatCompletionRequest": (
            *(*CHAT.length_keys, *CHAT.prompt_keys),
            *("chat_template_kwargs", "stream_options", "return_token_ids", "n", "stop", "include_reasoning"),
        ),
        "CompletionRequest": (
            *(*COMPLETIONS.length_keys, *COMPLETIONS.prompt_keys),
            *("prompt_logprobs", "ignore_eos", "stream_options", "n", "echo"),
            *("seed", "top_k", "repetition_penalty", "stop_token_ids", "skip_special_tokens", "return_token_ids"),
        ),
        "ResponsesRequest": (
            *(*RESPONSES.length_keys, *RESPONSES.prompt_keys),
            *("store", "background", "previous_response_id", "chat_template_kwargs"),
        ),
        "AnthropicMessagesRequest": (*MESSAGES.length_keys, *MESSAGES.prompt_keys, "chat_template_kwargs"),
        "AnthropicCountTokensRequest": ("messages", "tools", "chat_template_kwargs"),
        "EmbeddingCompletionRequest": ("input", "encoding_format"),
        "EmbeddingChatRequest": ("messages", "encoding_format"),
        "TokenizeChatRequest": ("messages", "chat_template_kwargs", "add_generation_prompt"),
        "TokenizeCompletionRequest": ("prompt", "add_special_tokens"),
        "DetokenizeRequest": ("tokens",),
    }
)
RESPONSE_FIELDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "ChatCompletionResponse": ("id", "choices", "usage", "system_fingerprint"),
        "ChatCompletionResponseChoice": ("finish_reason", "token_ids"),
        "ChatMessage": ("reasoning", "content", "tool_calls"),
        "DeltaMessage": ("reasoning", "content", "tool_calls"),
        "ChatCompletionResponseStreamChoice": ("delta", "finish_reason", "token_ids"),
        "CompletionResponse": ("model", "choices", "usage", "system_fingerprint"),
        "CompletionResponseChoice": ("prompt_logprobs", "prompt_token_ids", "token_ids", "finish_reason"),
        "UsageInfo": ("prompt_tokens", "completion_tokens", "prompt_tokens_details"),
        "ResponsesResponse": ("status", "output", "incomplete_details", "usage"),
        "AnthropicMessagesResponse": ("stop_reason", "usage", "content"),
        "TokenizeResponse": ("tokens", "count", "max_model_len"),
        "DetokenizeResponse": ("prompt",),
        "ModelCard": ("id", "root", "parent", "max_model_len"),
        "LoRAModulePath": ("name", "path"),
    }
)
CONTROL_ENDPOINTS = ("/health", "/load", "/metrics", "/version", "/v1/models")
# Labels of vllm:cache_config_info are the fields of its configuration.
CACHE_LABELS = ("kv_cache_size_tokens", "num_gpu_blocks", "block_size")
# Files, and what other modules of quantgate import or patch there.
NAMES: tuple[tuple[str, str], ...] = (
    ("entrypoints/openai/api_server.py", "run_server"),
    ("distributed/device_communicators/shm_broadcast.py", "sched_yield"),
)
# Files, and texts in them that quantgate looks for in what vLLM sends.
TEXTS: tuple[tuple[str, str, str], ...] = (
    ("renderers/params.py", "maximum context length", f"gateway: the code {CONTEXT_LENGTH_EXCEEDED}"),
    ("v1/engine/exceptions.py", "EngineCore", "gateway: errors of a dead engine are not passed on"),
    ("entrypoints/serve/instrumentator/basic.py", "server_load", "serving: requests of a replica that drains"),
    ("entrypoints/serve/middleware/x_request_id.py", "X-Request-Id", "gateway: request ids in replicas' logs"),
    ("sampling_params.py", "greater than max allowed: ", "quantize: evaluation through replicas"),
    ("plugins/__init__.py", "vllm.general_plugins", "serving: the plugin for CPUs"),
    ("config/lora.py", f"MaxLoRARanks = Literal[{', '.join(map(str, LORA_RANKS))}]", "config: ranks of LoRA adapters"),
    ("lora/peft_helper.py", "adapter_config.json", "config: reads the same file"),
    *(("lora/peft_helper.py", name, "config: refused adapters") for name in (*UNSUPPORTED_OPTIONS, *PLAIN_INITS)),
    ("v1/attention/backends/cpu_attn.py", "head_size divisible by 32", "preflight: FP8 KV cache on CPUs"),
    ("v1/attention/backends/cpu_attn.py", "requires x86 with AVX-512 or AMX", "preflight: FP8 KV cache on CPUs"),
    (
        "model_executor/layers/attention/attention.py",
        "fp8_e5m2 kv-cache is not supported with fp8 checkpoints",
        "preflight: types of the KV cache",
    ),
)


@dataclass(frozen=True, slots=True)
class Reliance:
    """One thing that vLLM must have; `where` narrows it to a file or a class."""

    kind: Kind
    name: str
    user: str
    where: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.name}{f' of {self.where}' if self.where else ''} ({self.user})"


def reliances() -> Iterator[Reliance]:
    """Yield everything that must be there."""
    command = launch_command()
    yield from (Reliance("flag", flag, "serving: the command line of a replica") for flag in flags_of(command))
    yield from (Reliance("flag", flag, "config: reserved flags") for flag in RESERVED_FLAGS)
    variables = sorted(command.environment.keys() - FOREIGN_VARIABLES)
    yield from (Reliance("variable", name, "serving: the environment of a replica") for name in variables)
    yield from (Reliance("metric", name, "gateway: the load of an engine") for name in WANTED)
    yield from (Reliance("metric", name, "deploy: dashboards") for name in ENGINE_METRICS)
    yield Reliance("metric", CACHE_INFO.decode(), "gateway: the size of the KV cache")
    yield from (Reliance("label", name, "gateway: the size of the KV cache", "CacheConfig") for name in CACHE_LABELS)
    yield from (Reliance("endpoint", each.path, "gateway: inference") for each in ENDPOINTS.values())
    yield from (Reliance("endpoint", path, "serving: control requests") for path in CONTROL_ENDPOINTS)
    for model, fields in (*REQUEST_FIELDS.items(), *RESPONSE_FIELDS.items()):
        yield from (Reliance("field", field, "gateway: reads or adds it", model) for field in fields)
    guarded = sorted(GUARDED_FIELDS - OLD_FIELDS)
    yield from (Reliance("field", name, "gateway: guarded fields", "any request") for name in guarded)
    parsers = sorted({each.parser for each in TOOL_FORMATS})
    yield from (Reliance("tool parser", parser, "serving: tool_calling") for parser in parsers)
    yield from (Reliance("reasoning parser", name, "serving: thinking") for name in (PARSER, *PARSERS_OF_TOKENS))
    yield from (Reliance("name", name, "serving: imported or patched", path) for path, name in NAMES)
    yield from (Reliance("text", text, user, path) for path, text, user in TEXTS)
    files = sorted({f"model_executor/{row.source}" for row in SUPPORTED})
    yield from (Reliance("file", path, "config: the table of weight formats") for path in files)
    yield from (
        Reliance("text", dtype, "config: KV cache dtypes", "config/cache.py") for dtype in get_args(KvCacheDtype)
    )


def missing(sources: Sources) -> list[Reliance]:
    """Return what a version of vLLM lacks."""
    return [reliance for reliance in reliances() if not FINDERS[reliance.kind](sources, reliance)]


def launch_command() -> Command:
    """Build a command line with every option that a replica can have."""
    return build_command(LAUNCH, 8101, Machine("python", Path("/cache"), 2, {}, log_format="json"))


def flags_of(command: Command) -> list[str]:
    """Return the flags of a command line."""
    return sorted({argument for argument in command.argv if argument.startswith("--")})


# How each kind is found


def _has_flag(sources: Sources, reliance: Reliance) -> bool:
    literals = sources.strings("engine/arg_utils.py") | sources.strings("entrypoints/*cli_args.py")
    name = reliance.name.partition(".")[0]
    if name in literals or not name.startswith("--"):
        return name in literals
    known = sources.fields("EngineArgs") | sources.fields("AsyncEngineArgs") | sources.fields("FrontendArgs")
    field = name.removeprefix("--").replace("-", "_")
    return field in known or field.removeprefix("no_") in known or f"--{field.removeprefix('no_')}" in literals


def _has_metric(sources: Sources, reliance: Reliance) -> bool:
    # The client library of Prometheus adds the suffix of a counter.
    return reliance.name.removesuffix("_total") in sources.strings("v1/metrics/loggers.py")


def _has_field(sources: Sources, reliance: Reliance) -> bool:
    models = REQUEST_FIELDS if reliance.where == "any request" else (reliance.where,)
    return any(reliance.name in sources.fields(model) for model in models)


def _has_text(sources: Sources, reliance: Reliance) -> bool:
    return any(reliance.name in sources.text(path) for path in sources.matching(reliance.where))


FINDERS: Mapping[Kind, Callable[[Sources, Reliance], bool]] = MappingProxyType(
    {
        "flag": _has_flag,
        "variable": lambda sources, each: each.name in sources.strings("envs.py"),
        "metric": _has_metric,
        "label": _has_field,
        "endpoint": lambda sources, each: each.name in sources.strings("entrypoints/*.py"),
        "field": _has_field,
        "tool parser": lambda sources, each: each.name in sources.strings("tool_parsers/__init__.py"),
        "reasoning parser": lambda sources, each: each.name in sources.strings("reasoning/__init__.py"),
        "name": lambda sources, each: each.name in sources.names(each.where),
        "text": _has_text,
        "file": lambda sources, each: any(sources.matching(each.name)),
    }
)
