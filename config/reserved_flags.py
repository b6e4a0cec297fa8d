"""Flags of vLLM that a replica's `args` may not carry, because quantgate sets them; pure.

A second `--port` would win over the first, and the replica would be looked for where it isn't; a second
`--max-model-len` would pass by the checks before launch. So they are refused, and the message names the option that
does the same. Everything else is the operator's, `--reasoning-parser` and `--chat-template` included: `args` come
last, so there they win.
"""

from collections.abc import Mapping
from types import MappingProxyType

_ALWAYS = "quantgate chooses it; remove it"

OWN_FLAGS: Mapping[str, str] = MappingProxyType(
    {
        "--model": "name the directory as the variant's path",
        "--served-model-name": "clients use the aliases of the configuration; remove it",
        "--host": _ALWAYS,
        "--port": "use port",
        "--uds": _ALWAYS,
        "--api-key": "use api_key; `ps` would show it here",
        "--dtype": "use dtype",
        "--tensor-parallel-size": "use tensor_parallel",
        "-tp": "use tensor_parallel",
        "--max-model-len": "use max_model_len",
        "--max-num-seqs": "use max_num_seqs",
        "--max-num-queued-reqs": "use max_queued",
        "--kv-cache-memory-bytes": "use kv_cache_bytes",
        "--enable-prefix-caching": "use prefix_caching",
        "--generation-config": _ALWAYS,
        "--shutdown-timeout": "use drain_seconds",
        "--fingerprint-mode": _ALWAYS,
        "--fingerprint-value": _ALWAYS,
        "--disable-access-log-for-endpoints": _ALWAYS,
        "--enable-request-id-headers": _ALWAYS,
        "--enable-server-load-tracking": _ALWAYS,
        "--enable-prompt-tokens-details": _ALWAYS,
        "--logging-config": "use serving.logs",
        "--data-parallel-size": "use count: independent replicas, which the gateway balances",
        "-dp": "use count: independent replicas, which the gateway balances",
    }
)


def own_flag(argument: str) -> str | None:
    """Give the flag of ours that an argument means, in any of the spellings that vLLM takes, or None."""
    if not argument.startswith("-"):
        return None
    flag = argument.partition("=")[0]
    if flag.startswith("--"):
        flag = flag.partition(".")[0].replace("_", "-")
        flag = f"--{flag.removeprefix('--no-')}" if flag.startswith("--no-") else flag
        # vLLM takes a flag's beginning for the flag.
        return flag if flag in OWN_FLAGS else next((own for own in OWN_FLAGS if own.startswith(flag)), None)
    return flag if flag in OWN_FLAGS else None
