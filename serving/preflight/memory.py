"""Whether weights, KV cache and overhead fit into free memory. Pure."""

from collections.abc import Iterable, Iterator, Sequence

from config.hardware import Gpu
from config.lora import engine_rank
from config.schema import ReplicaSettings
from serving.arguments import option
from serving.command import CPU_KV_CACHE_BYTES, MAX_LORAS
from serving.preflight.facts import MachineFacts, ModelFacts
from serving.replica import Launch

GIB = 2**30
# Three processes that have imported torch and vLLM, beyond weights and KV cache. Measured: 2.0 GiB with vLLM 0.32 on
# two cores; a little less here, because a launch that might fit must not be refused.
CPU_OVERHEAD_BYTES = int(1.75 * GIB)
# CUDA's context, vLLM's workspace and the smallest batch of activations.
GPU_OVERHEAD_BYTES = int(1.5 * GIB)
# vLLM's default --gpu-memory-utilization: a GPU with less than that free is refused before the model is loaded.
GPU_SHARE = 0.92
_SHARE_FLAG = "--gpu-memory-utilization"


def cache_reason(launch: Launch, model: ModelFacts) -> str | None:
    """Return why the KV cache does not hold one sequence of the longest length, as vLLM requires, or None."""
    cache_bytes = _cache_bytes(launch)
    tokens = launch.settings.max_model_len or model.longest_tokens
    per_token = model.cache_bytes_per_token(launch.settings)
    if cache_bytes is None or tokens is None or per_token is None or tokens * per_token <= cache_bytes:
        return None
    fitting = max(cache_bytes // per_token, 0)
    return (
        f"one request of max_model_len {tokens} needs {_size(tokens * per_token)} of KV cache, there is "
        f"{_size(cache_bytes)}; set kv_cache_bytes to {_size(tokens * per_token, up=True)} or more, or max_model_len "
        f"to {fitting} or less"
    )


def memory_reasons(pairs: Sequence[tuple[Launch, ModelFacts]], machine: MachineFacts) -> Iterator[str]:
    """List the launches that don't fit together, on CPU and on each GPU."""
    on_cpu = [(launch, model) for launch, model in pairs if launch.engine == "cpu"]
    needed = sum(cpu_bytes(launch, model) for launch, model in on_cpu)
    if on_cpu and needed > machine.free_bytes:
        shares = ", ".join(f"{launch.replica_id} {_size(cpu_bytes(launch, model))}" for launch, model in on_cpu)
        yield (
            f"replicas need about {_size(needed)} of memory ({shares}), {_size(machine.free_bytes)} are free; run "
            "fewer, or lower kv_cache_bytes"
        )
    yield from _gpu_reasons([(launch, model) for launch, model in pairs if launch.engine == "cuda"], machine.gpus)


def cpu_bytes(launch: Launch, model: ModelFacts) -> int:
    """Main memory that one CPU replica takes."""
    settings = launch.settings
    weights = model.weight_bytes * settings.ranks // _weight_shares(settings)
    cache, adapters = _cache_bytes(launch) or 0, adapters_bytes(launch, model)
    return weights + settings.ranks * (cache + adapters) + CPU_OVERHEAD_BYTES


def adapters_bytes(launch: Launch, model: ModelFacts) -> int:
    """Memory that each rank reserves for the LoRA adapters of one batch; 0 where that is unknown."""
    loras = [lora for lora in launch.variant.loras if lora.path is not None]
    if not loras:
        return 0
    slots = option(launch.settings.args, "--max-loras") or ""
    count = int(slots) if slots.isdecimal() else min(len(loras), MAX_LORAS)
    rank = engine_rank(max(lora.rank for lora in loras))
    return count * (model.lora_bytes(rank, launch.settings.tensor_parallel) or 0)


def _gpu_reasons(pairs: Iterable[tuple[Launch, ModelFacts]], gpus: Sequence[Gpu]) -> Iterator[str]:
    known = {gpu.index: gpu for gpu in gpus}
    for launch, model in pairs:
        for gpu in (known[index] for index in launch.gpus or tuple(known)[: launch.settings.ranks] if index in known):
            reason = _gpu_reason(launch, model, gpu)
            if reason:
                yield f"{launch.replica_id}: GPU {gpu.index} ({gpu.name}): {reason}"


def _gpu_reason(launch: Launch, model: ModelFacts, gpu: Gpu) -> str | None:
    settings = launch.settings
    share = _gpu_share(settings.args)
    claimed = int(gpu.total_bytes * share)
    if gpu.free_bytes < claimed:
        return (
            f"{_size(gpu.free_bytes)} of {_size(gpu.total_bytes)} are free, vLLM wants {share:.0%}; end what else runs "
            f"there, or add {_SHARE_FLAG} {_rounded_share(gpu)} to args"
        )
    per_token = model.cache_bytes_per_token(settings) or 0
    tokens = settings.max_model_len or model.longest_tokens or 0
    cache = settings.kv_cache_bytes or per_token * tokens
    weights = model.weight_bytes // _weight_shares(settings)
    adapters = adapters_bytes(launch, model)
    needed = weights + cache + adapters + GPU_OVERHEAD_BYTES
    if needed <= (gpu.free_bytes if settings.kv_cache_bytes else claimed):
        return None
    parts = f"weights {_size(weights)}, KV cache {_size(cache)}{_with_adapters(adapters)} and overhead"
    return (
        f"{parts} need {_size(needed)}, {_size(claimed)} may be used; use more tensor_parallel or pipeline_parallel, "
        "kv_cache_dtype: fp8, a smaller max_model_len, or a variant of fewer bits"
    )


def _with_adapters(adapters: int) -> str:
    return f", LoRA adapters {_size(adapters)}" if adapters else ""


def _weight_shares(settings: ReplicaSettings) -> int:
    """How many ranks share the weights at most: with expert_parallel, data-parallel ranks share the experts."""
    return settings.ranks if settings.expert_parallel else settings.tensor_parallel * settings.pipeline_parallel


def oversubscribed_gpus(launches: Sequence[Launch], gpus: Sequence[Gpu]) -> Iterator[str]:
    """List launches that name a GPU that isn't there, or share one because they name none."""
    known = {gpu.index for gpu in gpus}
    there = ", ".join(map(str, sorted(known)))
    for launch in launches:
        missing = [index for index in launch.gpus if known and index not in known]
        if missing:
            yield f"{launch.replica_id}: there is no GPU {', '.join(map(str, missing))} here; there are {there}"
    unnamed = [launch for launch in launches if launch.engine == "cuda" and not launch.gpus]
    for launch in unnamed:
        if known and launch.settings.ranks > len(known):
            yield f"{launch.replica_id}: needs {launch.settings.ranks} GPUs ({_factors(launch)}); there are {there}"
    if len(unnamed) > 1:
        names = ", ".join(launch.replica_id for launch in unnamed)
        yield f"{names} would all run on the first GPU; give each replica its gpus"


def _factors(launch: Launch) -> str:
    kinds = ("tensor_parallel", "pipeline_parallel", "data_parallel")
    ranks = {kind: getattr(launch.settings, kind) for kind in kinds}
    return " x ".join(f"{kind} {count}" for kind, count in ranks.items() if count > 1)


def _cache_bytes(launch: Launch) -> int | None:
    return launch.settings.kv_cache_bytes or (CPU_KV_CACHE_BYTES if launch.engine == "cpu" else None)


def _gpu_share(arguments: Sequence[str]) -> float:
    text = option(arguments, _SHARE_FLAG) or ""
    return float(text) if text.replace(".", "", 1).isdecimal() else GPU_SHARE


def _rounded_share(gpu: Gpu) -> str:
    return f"{max(0, int(100 * gpu.free_bytes / gpu.total_bytes) - 1) / 100:.2f}"


def _size(count: int, *, up: bool = False) -> str:
    """Write bytes as the configuration does; rounded up where the reader copies the number."""
    if up:
        return f"{-(-count // 2**20)}MiB"
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / 2**20:.0f} MiB"
