"""What a replica needs by its kinds of parallelism and its KV cache, against a plain count of what each rank holds."""

from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest

from config.hardware import Gpu
from config.lora import Lora
from config.rules import violations
from config.schema import ReplicaSettings, Settings
from config.variant import PARENT_QUALITY, Variant
from serving.command import Machine, build_command
from serving.preflight.facts import MachineFacts, ModelFacts
from serving.preflight.memory import CPU_OVERHEAD_BYTES, GPU_OVERHEAD_BYTES, GPU_SHARE
from serving.preflight.refusals import oversubscribed, unservable
from serving.replica import Launch, plan_launches

MIB = 2**20
LAYERS, HEADS, KEY_VALUE, HEAD_SIZE, CONTEXT = 6, 8, 4, 64, 8192
CONFIG: dict[str, Any] = {
    "hidden_size": HEADS * HEAD_SIZE,
    "intermediate_size": 1024,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_VALUE,
    "num_hidden_layers": LAYERS,
    "num_experts": 8,
    "max_position_embeddings": CONTEXT,
}
WEIGHTS = 960 * MIB
MODEL = ModelFacts(CONFIG, WEIGHTS)
VARIANT = Variant("a", "bf16", PARENT_QUALITY, Path("/a"))
# KV cache, tensor, pipeline and data parallelism, experts shared.
COMBINATIONS = list(product(("auto", "bfloat16", "fp8"), (1, 2, 8), (1, 4), (1, 2), (False, True)))


def settings_of(cache: Any, tensor: int, pipeline: int, data: int, experts: bool, **more: Any) -> ReplicaSettings:
    """A replica of one combination."""
    return ReplicaSettings(
        variant="a",
        kv_cache_dtype=cache,
        tensor_parallel=tensor,
        pipeline_parallel=pipeline,
        data_parallel=data,
        expert_parallel=experts,
        **more,
    )


def cache_bytes(cache: str, tensor: int, pipeline: int) -> int:
    """The cache of the rank that has most of it, counted one layer and one head at a time."""
    layers = [sum(layer % pipeline == stage for layer in range(LAYERS)) for stage in range(pipeline)]
    heads = [max(1, sum(head % tensor == rank for head in range(KEY_VALUE))) for rank in range(tensor)]
    return max(layers) * max(heads) * 2 * HEAD_SIZE * (1 if cache.startswith("fp8") else 2) * CONTEXT


@pytest.mark.parametrize("combination", COMBINATIONS, ids=str)
def test_gpus_of_a_replica(combination: tuple[Any, ...]) -> None:
    """Placement, the rules of the file and vLLM's flags agree: a replica takes the product of its parallelism."""
    cache, tensor, pipeline, data, experts = combination
    product_of_all = tensor * pipeline * data
    replica = settings_of(*combination, count=2, gpus=tuple(range(2 * product_of_all)))
    table = {"variants": {"a": {"path": "/a"}}, "replicas": [replica.model_dump()]}
    assert violations(Settings.model_validate(table)) == []
    fewer = [replica.model_copy(update={"gpus": replica.gpus[1:]}).model_dump()]
    (wrong,) = violations(Settings.model_validate({**table, "replicas": fewer}))
    assert wrong.hint == f"list {2 * product_of_all} GPUs"
    first, second = plan_launches((replica,), {"a": VARIANT}, "cuda")
    assert (*first.gpus, *second.gpus) == replica.gpus
    argv = build_command(first, 8101, Machine("python", Path("/cache"), 2, {})).argv
    given = dict(pairwise(argv))
    sizes = [given.get(f"--{kind}-parallel-size", "1") for kind in ("tensor", "pipeline", "data")]
    assert sizes == [str(each) for each in (tensor, pipeline, data)]
    assert ("--enable-expert-parallel" in argv) is experts
    assert given.get("--kv-cache-dtype", "auto") == cache


@pytest.mark.parametrize("combination", COMBINATIONS, ids=str)
def test_memory_of_a_gpu(combination: tuple[Any, ...]) -> None:
    """A GPU with a little more than what one rank holds will do, one with a little less will not, for every rank."""
    cache, tensor, pipeline, data, experts = combination
    shares = tensor * pipeline * (data if experts else 1)
    needed = WEIGHTS // shares + cache_bytes(cache, tensor, pipeline) + GPU_OVERHEAD_BYTES
    ranks = tensor * pipeline * data
    launch = Launch("a-1", VARIANT, "cuda", settings_of(*combination), tuple(range(ranks)))
    for spare, refused in ((MIB, 0), (-MIB, ranks)):
        total = int((needed + spare) / GPU_SHARE)
        gpus = tuple([Gpu(index, "H100", total, total, "570") for index in range(ranks)])
        found = oversubscribed([(launch, MODEL)], MachineFacts(0, gpus=gpus))
        assert len(found) == refused, found
        # Without `gpus`, the first ones are used.
        unnamed = Launch("a-1", VARIANT, "cuda", launch.settings)
        assert len(oversubscribed([(unnamed, MODEL)], MachineFacts(0, gpus=gpus))) == refused


@pytest.mark.parametrize("combination", COMBINATIONS, ids=str)
def test_memory_of_a_cpu(combination: tuple[Any, ...]) -> None:
    """Every rank has a KV cache; the engines of a data-parallel server have all weights each, or share the experts."""
    cache, tensor, pipeline, data, experts = combination
    own = cache_bytes(cache, tensor, pipeline)
    launch = Launch("a-1", VARIANT, "cpu", settings_of(*combination, kv_cache_bytes=own))
    needed = WEIGHTS * (1 if experts else data) + tensor * pipeline * data * own + CPU_OVERHEAD_BYTES
    assert not oversubscribed([(launch, MODEL)], MachineFacts(needed))
    assert oversubscribed([(launch, MODEL)], MachineFacts(needed - 1))


@pytest.mark.parametrize("engine", ["cpu", "cuda"])
@pytest.mark.parametrize("combination", COMBINATIONS, ids=str)
def test_the_longest_request_fits(combination: tuple[Any, ...], engine: Any) -> None:
    """A KV cache that holds one request of the longest length is enough for vLLM; a smaller one is refused."""
    cache, tensor, pipeline, *_ = combination
    needed = cache_bytes(cache, tensor, pipeline)
    for kv_cache_bytes, refused in ((needed, False), (needed - 1, True)):
        launch = Launch("a-1", VARIANT, engine, settings_of(*combination, kv_cache_bytes=kv_cache_bytes))
        found = unservable(launch, MODEL)
        assert bool(found) is refused, found


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}


@pytest.mark.parametrize(
    "engine,settings,config,word",
    [
        ("cpu", {"kv_cache_dtype": "fp8"}, {"head_dim": 80}, "multiple of 32, not 80"),
        ("cuda", {"kv_cache_dtype": "fp8"}, {"head_dim": 80}, ""),
        ("cpu", {"kv_cache_dtype": "bfloat16"}, {"head_dim": 80}, ""),
        ("cuda", {"kv_cache_dtype": "fp8_e5m2"}, {"quantization_config": FP8}, "use fp8"),
        ("cuda", {"kv_cache_dtype": "fp8"}, {"quantization_config": FP8}, ""),
        ("cuda", {"pipeline_parallel": 7}, {}, "6 layers can't be shared by pipeline_parallel 7"),
        ("cuda", {"expert_parallel": True}, {"num_experts": None}, "has no experts"),
    ],
)
def test_what_vllm_refuses(engine: Any, settings: dict[str, Any], config: dict[str, Any], word: str) -> None:
    """Types of the KV cache and kinds of parallelism that a model or an engine has not."""
    launch = Launch("a-1", VARIANT, engine, ReplicaSettings(variant="a", kv_cache_bytes=2**30, **settings))
    found = "; ".join(unservable(launch, ModelFacts({**CONFIG, **config})))
    assert word in found
    assert bool(found) is bool(word)


def test_fp8_cache_needs_a_kernel() -> None:
    """vLLM has one for CPUs with AVX-512."""
    launch = Launch("a-1", VARIANT, "cpu", ReplicaSettings(variant="a", kv_cache_dtype="fp8"))
    (reason,) = oversubscribed([(launch, MODEL)], MachineFacts(2**40, flags=frozenset({"avx2"})))
    assert "needs AVX-512 or AMX, which this CPU lacks" in reason
    assert oversubscribed([(launch, MODEL)], MachineFacts(2**40)) == []


@pytest.mark.parametrize("scheme,bytes_of_number", [(None, 2), ({"num_bits": 8, "type": "float"}, 1)])
def test_a_checkpoint_with_scales_has_an_fp8_cache(scheme: dict[str, Any] | None, bytes_of_number: int) -> None:
    """`auto` is what the checkpoint says; an explicit type wins."""
    model = ModelFacts(
        {**CONFIG, "quantization_config": {"quant_method": "compressed-tensors", "kv_cache_scheme": scheme}}
    )
    auto, explicit = ReplicaSettings(variant="a"), ReplicaSettings(variant="a", kv_cache_dtype="bfloat16")
    one = 2 * LAYERS * KEY_VALUE * HEAD_SIZE
    assert model.cache_bytes_per_token(auto) == bytes_of_number * one
    assert model.cache_bytes_per_token(explicit) == 2 * one


@pytest.mark.parametrize("args,slots", [((), 2), (("--max-loras", "5"), 5), (("--max-loras=1",), 1)])
@pytest.mark.parametrize("tensor", [1, 2])
def test_memory_of_adapters(tensor: int, args: tuple[str, ...], slots: int) -> None:
    """Each rank reserves room for the adapters of one batch at the largest rank: all of `A`, its share of `B`."""
    hidden, keys, inner = HEADS * HEAD_SIZE, KEY_VALUE * HEAD_SIZE, CONFIG["intermediate_size"]
    matrices = [(hidden, hidden), (hidden, keys), (hidden, keys), (hidden, hidden)]
    matrices += [(hidden, inner), (hidden, inner), (inner, hidden)]
    numbers = sum(inputs + outputs // tensor for inputs, outputs in matrices) * 16 * LAYERS
    variant = Variant(
        "a", "bf16", PARENT_QUALITY, Path("/a"), loras=(Lora("x", Path("/x"), 9), Lora("y", Path("/y"), 4))
    )
    launch = Launch("a-1", variant, "cpu", settings_of("auto", tensor, 1, 1, False, kv_cache_bytes=MIB, args=args))
    needed = WEIGHTS + tensor * (MIB + slots * 2 * numbers) + CPU_OVERHEAD_BYTES
    assert not oversubscribed([(launch, MODEL)], MachineFacts(needed))
    assert oversubscribed([(launch, MODEL)], MachineFacts(needed - 1))
