"""Version and KV cache capacity of a vLLM server."""

import re
from dataclasses import dataclass

import httpx

from serving.clients import root_of
from serving.errors import ProbeFailed

CACHE_INFO = re.compile(r"^vllm:cache_config_info\{(.*)\}", re.MULTILINE)
LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """Version and KV cache capacity; the latter is None if /metrics does not report it."""

    version: str
    kv_capacity_tokens: int | None


async def engine_facts(client: httpx.AsyncClient, url: str) -> EngineFacts:
    """Read the facts of a server; ProbeFailed if it is not vLLM."""
    try:
        reply = await client.get(f"{root_of(url)}/version")
        reply.raise_for_status()
        version = reply.json()["version"]
        page = await client.get(f"{root_of(url)}/metrics")
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        raise ProbeFailed(f"{url}: is not a vLLM server ({error!r}); a replica is measured, not a gateway") from error
    metrics = page.text if page.status_code == httpx.codes.OK else ""
    return EngineFacts(str(version), kv_capacity_tokens(metrics))


def kv_capacity_tokens(page: str) -> int | None:
    """Return the size of the KV cache in a page of metrics; several engines of one server add up."""
    sizes = [_tokens(dict(LABEL.findall(labels))) for labels in CACHE_INFO.findall(page)]
    known = [size for size in sizes if size]
    return sum(known) or None


def _tokens(labels: dict[str, str]) -> int | None:
    if labels.get("kv_cache_size_tokens", "").isdigit():
        return int(labels["kv_cache_size_tokens"])
    blocks, size = labels.get("num_gpu_blocks", ""), labels.get("block_size", "")
    return int(blocks) * int(size) if blocks.isdigit() and size.isdigit() else None
