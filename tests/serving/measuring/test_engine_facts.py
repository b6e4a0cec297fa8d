"""What a page of metrics says of the KV cache."""

import httpx
import pytest

from serving.errors import ProbeFailed
from serving.measuring.engine_facts import engine_facts, kv_capacity_tokens
from tests.fakes.replica import KV_TOKENS
from tests.fakes.running import running_fake

SIZE = 'vllm:cache_config_info{block_size="16",kv_cache_size_tokens="4096",num_gpu_blocks="9"} 1.0\n'
BLOCKS = 'vllm:cache_config_info{block_size="16",kv_cache_size_tokens="None",num_gpu_blocks="9"} 1.0\n'


@pytest.mark.parametrize(
    "page,tokens",
    [(SIZE, 4096), (BLOCKS, 144), (SIZE + BLOCKS, 4240), ("", None), ("vllm:cache_config_info{} 1\n", None)],
)
def test_the_size_of_the_cache(page: str, tokens: int | None) -> None:
    """In tokens where it is told, in blocks else; engines add up."""
    assert kv_capacity_tokens(f"# HELP x\n{page}other 1\n") == tokens


async def test_a_server_is_asked() -> None:
    """The fake tells both, like vLLM."""
    async with running_fake() as fake, httpx.AsyncClient() as client:
        facts = await engine_facts(client, fake.url)
    assert (facts.version, facts.kv_capacity_tokens) == ("0.32.0", KV_TOKENS)


async def test_what_is_no_vllm_is_told() -> None:
    """An address where nobody listens is not measured."""
    async with httpx.AsyncClient() as client:
        with pytest.raises(ProbeFailed, match="is not a vLLM server"):
            await engine_facts(client, "http://127.0.0.1:9")
