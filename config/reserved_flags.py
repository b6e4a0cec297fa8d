"""vLLM flags that quantgate sets itself and that are therefore invalid in a replica's `args`.

`args` come last on vLLM's command line and override earlier flags: quantgate would look for a replica with a second
`--port` at the wrong port, and a second `--max-model-len` would bypass the checks before launch. Each flag has a hint
with the option to use instead. All other flags are allowed, `--reasoning-parser` and `--chat-template` included.
"""

from collections.abc import Mapping
from types import MappingProxyType

_ALWAYS = "quantgate always sets it; remove it"

RESERVED_FLAGS: Mapping[str, str] = MappingProxyType(
    {
        "--model": "set the variant's path",
        "--served-model-name": "clients use the aliases of the configuration; remove it",
        "--host": _ALWAYS,
        "--port": "use port",
        "--uds": _ALWAYS,
        "--api-key": "use api_key, which `ps` does not show",
        "--dtype": "use dtype",
        "--tensor-parallel-size": "use tensor_parallel",
        "-tp": "use tensor_parallel",
        "--max-model-len": "use max_model_len",
        "--max-num-seqs": "use max_num_seqs",
        "--max-num-queued-reqs": "use max_queued",
        "--kv-cache-memory-bytes": "use kv_cache_bytes",
        "--enable-prefix-caching": "use prefix_caching",
        "--generation-config": _ALWAYS,
        "--allowed-media-domains": "use gateway.media_domains",
        "--shutdown-timeout": "use drain_seconds",
        "--fingerprint-mode": _ALWAYS,
        "--fingerprint-value": _ALWAYS,
        "--disable-access-log-for-endpoints": _ALWAYS,
        "--enable-request-id-headers": _ALWAYS,
        "--enable-server-load-tracking": _ALWAYS,
        "--enable-prompt-tokens-details": _ALWAYS,
        "--logging-config": "use serving.logs",
        "--pipeline-parallel-size": "use pipeline_parallel",
        "-pp": "use pipeline_parallel",
        "--data-parallel-size": "use data_parallel, or count for independent replicas",
        "-dp": "use data_parallel, or count for independent replicas",
        "--enable-expert-parallel": "use expert_parallel",
        "-ep": "use expert_parallel",
        "--kv-cache-dtype": "use kv_cache_dtype",
        "--speculative-config": "use speculative",
        "-sc": "use speculative",
        "--enable-lora": "use lora of the variant",
        "--lora-modules": "use lora of the variant",
        "--max-lora-rank": "quantgate derives it from the adapters; remove it",
    }
)


def reserved_flag(argument: str) -> str | None:
    """Return the reserved flag that an argument sets, in any spelling that vLLM accepts, or None."""
    if not argument.startswith("-"):
        return None
    flag = argument.partition("=")[0]
    if flag.startswith("--"):
        flag = flag.partition(".")[0].replace("_", "-")
        flag = f"--{flag.removeprefix('--no-')}" if flag.startswith("--no-") else flag
        # argparse accepts an unambiguous prefix of a flag.
        return (
            flag if flag in RESERVED_FLAGS else next((name for name in RESERVED_FLAGS if name.startswith(flag)), None)
        )
    return flag if flag in RESERVED_FLAGS else None
