"""Pages of metrics as vLLM 0.32 writes them."""

from collections.abc import Iterable, Mapping

from gateway.routing.engine_metrics import GENERATED_TOKENS, KV_USAGE, READ_TOKENS, RUNNING, WAITING

Samples = Mapping[str, Iterable[str]]  # what a metric says, engine by engine

LOAD: dict[str, tuple[str, ...]] = {
    RUNNING: ("3.0",),
    WAITING: ("2.0",),
    KV_USAGE: ("0.25",),
    READ_TOKENS: ("1.234567e+06",),
    GENERATED_TOKENS: ("4321.0",),
}
CACHE = 'block_size="16",cache_dtype="auto",kv_cache_size_tokens="4096",mamba_block_size="None",num_gpu_blocks="256"'
# Histograms of the engine and the server in front of it, with about as many buckets as there are.
HISTOGRAMS = (
    *("vllm:time_to_first_token_seconds", "vllm:inter_token_latency_seconds", "vllm:e2e_request_latency_seconds"),
    *("vllm:request_queue_time_seconds", "vllm:request_inference_time_seconds", "vllm:request_prefill_time_seconds"),
    *("vllm:request_decode_time_seconds", "vllm:request_prompt_tokens", "vllm:request_generation_tokens"),
    *("vllm:iteration_tokens_total", "vllm:request_params_n", "vllm:request_params_max_tokens"),
    *("vllm:request_time_per_output_token_seconds", "vllm:request_prefill_kv_computed_tokens"),
    *(f"http_request_duration_seconds_{number}" for number in range(12)),
)


def page_of(samples: Samples, caches: Iterable[str] = (CACHE,), *, others: bool = True) -> bytes:
    """A page with these samples, in among all others that vLLM has or alone."""
    lines = list(_process()) if others else []
    for name, values in samples.items():
        lines += [f"# HELP {name} What it is, {name} of all.", f"# TYPE {name} gauge"]
        lines += [f'{name}{{engine="{number}",model_name="a }} b"}} {value}' for number, value in enumerate(values)]
        if others:
            lines += [f'{name}_created{{engine="0",model_name="m"}} 1.7e+09', f'{name}_by_reason{{reason="x"}} 77.0']
    lines += ["# HELP vllm:cache_config_info Cache.", "# TYPE vllm:cache_config_info gauge"]
    lines += [f'vllm:cache_config_info{{{labels},engine="{number}"}} 1.0' for number, labels in enumerate(caches)]
    if others:
        lines += [line for name in HISTOGRAMS for line in _histogram(name)]
    return "\n".join([*lines, ""]).encode()


def _process() -> Iterable[str]:
    for number in range(12):
        name = f"python_gc_objects_{number}_total"
        yield from (f"# HELP {name} Objects.", f"# TYPE {name} counter", f'{name}{{generation="0"}} {number}.0')


def _histogram(name: str) -> Iterable[str]:
    yield from (f"# HELP {name} Histogram of it.", f"# TYPE {name} histogram")
    labels = 'engine="0",model_name="HuggingFaceTB/SmolLM2-135M-Instruct"'
    for edge in range(22):
        yield f'{name}_bucket{{{labels},le="{edge / 8}"}} {edge}.0'
    yield from (f"{name}_count{{{labels}}} 22.0", f"{name}_sum{{{labels}}} 30.5")
