"""How much KV cache a replica needs, by its data type and its parallelism."""

from typing import Any

import pytest

from config.schema import ReplicaSettings
from config.variant import PARENT_QUALITY, Variant
from serving.preflight.facts import ModelFacts
from serving.preflight.memory import cache_reason
from serving.replica import Launch

QWQ_32B = {
    "num_hidden_layers": 64,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "hidden_size": 5120,
    "max_position_embeddings": 131072,
}
GIB = 2**30


@pytest.mark.parametrize(
    "settings,bytes_per_token",
    [
        ({}, 2 * 64 * 8 * 128 * 2),
        ({"dtype": "float32"}, 2 * 64 * 8 * 128 * 4),
        ({"dtype": "float32", "kv_cache_dtype": "bfloat16"}, 2 * 64 * 8 * 128 * 2),
        ({"kv_cache_dtype": "fp8"}, 2 * 64 * 8 * 128),
        ({"kv_cache_dtype": "fp8_e5m2", "tensor_parallel": 2}, 2 * 64 * 4 * 128),
        ({"tensor_parallel": 16}, 2 * 64 * 1 * 128 * 2),
        ({"pipeline_parallel": 4}, 2 * 16 * 8 * 128 * 2),
        ({"pipeline_parallel": 3}, 2 * 22 * 8 * 128 * 2),
        ({"data_parallel": 4}, 2 * 64 * 8 * 128 * 2),
    ],
)
def test_bytes_of_a_token(settings: dict[str, Any], bytes_per_token: int) -> None:
    """Ranks share heads and layers; every engine of a data-parallel server has a cache of its own."""
    assert ModelFacts(QWQ_32B).cache_bytes_per_token(ReplicaSettings(variant="a", **settings)) == bytes_per_token


def test_fp8_halves_what_the_longest_request_needs() -> None:
    """131,072 tokens of a QwQ-32B on two GPUs: 16 GiB each in bfloat16, 8 GiB in fp8."""
    variant = Variant("qwq", "bf16", PARENT_QUALITY)

    def reason(**settings: Any) -> str | None:
        replica = ReplicaSettings(
            variant="qwq", tensor_parallel=2, max_model_len=131072, kv_cache_bytes=9 * GIB, **settings
        )
        return cache_reason(Launch("qwq-1", variant, "cuda", replica), ModelFacts(QWQ_32B))

    assert "needs 16.0 GiB of KV cache" in (reason() or "")
    assert reason(kv_cache_dtype="fp8") is None
