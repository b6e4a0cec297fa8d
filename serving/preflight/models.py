"""What vLLM 0.32 refuses about a model and how it is to be run, apart from its quantization; pure."""

from collections.abc import Iterator

from config.manifest import Engine
from config.schema import ReplicaSettings
from serving.preflight.facts import ModelFacts

# vLLM finds these two by their token, and doesn't start without (reasoning/basic_parsers.py).
THINK_TOKENS = frozenset({"<think>", "</think>"})
TOKEN_PARSERS = frozenset({"deepseek_r1"})
# vllm/model_executor/layers/attention/attention.py: they load scales of the KV cache.
_FP8_CHECKPOINTS = frozenset({"fp8", "modelopt"})
CPU_FP8_HEAD = 32  # vllm/v1/attention/backends/cpu_attn.py
_TRUST = "--trust-remote-code"


def model_reasons(model: ModelFacts, settings: ReplicaSettings, parser: str | None) -> Iterator[str]:
    """Yield the reasons why a model cannot be served as configured."""
    if "modules.json" in model.files:
        yield "modules.json makes vLLM take it for a sentence-transformers model; move that file out of the directory"
    own = model.config.get("auto_map")
    if own and _TRUST not in settings.args:
        yield (
            "its config.json names its own code (auto_map), which vLLM does not run by default; read that code, then "
            f"add {_TRUST} to args, or remove auto_map if vLLM knows the architecture"
        )
    longest, wanted = model.longest_tokens, settings.max_model_len
    if longest and wanted and wanted > longest:
        yield f"max_model_len {wanted} is more than the {longest} tokens of its config.json; choose {longest} at most"
    if parser in TOKEN_PARSERS and model.special_tokens and not model.special_tokens >= THINK_TOKENS:
        yield f"its tokenizer has no <think> and </think>, which the reasoning parser {parser} needs; use qwen3"


def cache_dtype_reason(model: ModelFacts, settings: ReplicaSettings, engine: Engine) -> str | None:
    """Return why the KV cache cannot have the configured type, or None."""
    fp8_weights = (model.quantization or {}).get("quant_method") in _FP8_CHECKPOINTS
    if settings.kv_cache_dtype == "fp8_e5m2" and (fp8_weights or model.has_cache_scales):
        return "kv_cache_dtype fp8_e5m2 is not supported with FP8 checkpoints; use fp8"
    size = model.head_size
    if engine == "cpu" and size and size % CPU_FP8_HEAD and model.has_fp8_cache(settings):
        return (
            f"an FP8 KV cache on CPU needs a head size that is a multiple of {CPU_FP8_HEAD}, not {size}; serve it on "
            "CUDA, or without an FP8 cache"
        )
    return None


def sharing_reasons(model: ModelFacts, settings: ReplicaSettings) -> Iterator[str]:
    """Yield what the ranks of a server cannot share: layers by pipeline, heads and matrices by tensor parallelism."""
    layers, stages, ranks = (
        model.number("num_hidden_layers", "n_layer"),
        settings.pipeline_parallel,
        settings.tensor_parallel,
    )
    if layers and stages > layers:
        yield f"{layers} layers can't be shared by pipeline_parallel {stages}; use at most {layers}"
    if settings.expert_parallel and not model.number("num_experts", "num_local_experts", "n_routed_experts"):
        yield "expert_parallel is set, but its config.json has no experts; remove it"
    heads, key_value = model.heads, model.key_value_heads
    fix = "choose another tensor_parallel"
    if ranks == 1:
        return
    if heads and heads % ranks:
        yield f"{heads} attention heads can't be shared by tensor_parallel {ranks}; {fix}"
    if key_value and key_value % ranks and ranks % key_value:
        yield f"{key_value} key-value heads can't be shared by tensor_parallel {ranks}; {fix}"
    inner = model.number("intermediate_size")
    if inner and inner % ranks:
        yield f"intermediate size {inner} can't be shared by tensor_parallel {ranks}; {fix}"
