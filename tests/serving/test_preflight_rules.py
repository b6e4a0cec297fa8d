"""What keeps a model from being served as configured, as tables: facts in, reasons out."""

from pathlib import Path
from typing import Any

import pytest

from config.hardware import Gpu
from config.schema import ReplicaSettings
from config.variant import PARENT_QUALITY, Variant
from serving.preflight.facts import MachineFacts, ModelFacts
from serving.preflight.refusals import oversubscribed, unservable
from serving.replica import Launch, Thinking

GIB = 2**30
VARIANT = Variant("a", "int4", PARENT_QUALITY, Path("/a"))
# 8 heads of 32, 2 layers: one token of KV cache is 2 x 2 x 4 x 32 x 2 bytes = 1 KiB.
CONFIG = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_hidden_layers": 2,
    "max_position_embeddings": 4096,
}
FP8 = {"num_bits": 8, "type": "float"}
FP8_DYNAMIC = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**FP8, "strategy": "channel"},
            "input_activations": {**FP8, "strategy": "token", "dynamic": True},
        }
    },
}
FP8_BLOCK = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}


def compressed(bits: int, **weights: Any) -> dict[str, Any]:
    """A compressed-tensors config with plain weights of so many bits."""
    strategy = "group" if "group_size" in weights else "channel"
    group = {"weights": {"num_bits": bits, "type": "int", "strategy": strategy, **weights}, "input_activations": None}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}


INT4_WITH_ZEROS = compressed(4, group_size=32, symmetric=False)


def reasons(
    config: dict[str, Any], settings: dict[str, Any], engine: Any = "cpu", parser: str | None = None, **facts: Any
) -> str:
    """Every reason against a launch."""
    replica = ReplicaSettings(variant="a", **settings)
    launch = Launch("a-1", VARIANT, engine, replica, thinking=Thinking(parser))
    return "\n".join(unservable(launch, ModelFacts({**CONFIG, **config}, **facts)))


def model(weight_bytes: int = GIB, **config: Any) -> ModelFacts:
    """A model of some size."""
    return ModelFacts({**CONFIG, **config}, weight_bytes)


def launch(name: str = "a-1", engine: Any = "cpu", gpus: tuple[int, ...] = (), **settings: Any) -> Launch:
    """A launch with these settings."""
    return Launch(name, VARIANT, engine, ReplicaSettings(variant="a", **settings), gpus, settings.get("port"))


@pytest.mark.parametrize(
    "config,settings,word",
    [
        ({}, {}, ""),
        ({"quantization_config": GPTQ}, {}, ""),
        ({"quantization_config": GPTQ}, {"dtype": "float32"}, "GPTQ does not compute in float32"),
        ({"quantization_config": GPTQ}, {"dtype": "float16"}, ""),
        (
            {"quantization_config": {**GPTQ, "dynamic": {"+:x": {"bits": 8}}}},
            {},
            "GPTQ (rule '+:x') of 4 bits, not of 8",
        ),
        ({"quantization_config": {**GPTQ, "dynamic": {"-:x": {}}}}, {}, ""),
        ({"quantization_config": {**GPTQ, "dynamic": {"x": {"desc_act": True}}}}, {}, "GPTQ (rule 'x') with desc_act"),
        ({"quantization_config": {**GPTQ, "group_size": 64}, "intermediate_size": 480}, {}, "down_proj: 480 inputs"),
        ({"quantization_config": {**GPTQ, "group_size": -1}, "hidden_size": 264}, {}, "not both multiples of 32"),
        ({"quantization_config": compressed(4, group_size=32)}, {}, ""),
        ({"quantization_config": compressed(4, group_size=32)}, {"dtype": "float32"}, "int4 on CPU does not compute"),
        ({"quantization_config": compressed(8)}, {}, "use scheme w8a8"),
        ({"quantization_config": compressed(4, group_size=32, actorder="group")}, {}, "actorder"),
        ({"quantization_config": compressed(4, group_size=32, actorder="static")}, {}, ""),
        ({"quantization_config": compressed(3)}, {}, "of 4 bits, not of 3"),
        # FP8 weights without FP8 activations have kernels on GPUs only (_POSSIBLE_WFP8A16_KERNELS).
        ({"quantization_config": compressed(8, type="float")}, {}, "use scheme fp8-dynamic"),
        ({"quantization_config": FP8_DYNAMIC}, {}, ""),
        ({"quantization_config": FP8_BLOCK}, {}, ""),
        ({"quantization_config": {"quant_method": "fp8"}}, {}, "has no activation_scheme"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, {}, "does not load"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, {}, "no CPU kernel for MXFP4"),
        ({"quantization_config": {"quant_method": "quark"}}, {}, ""),
        ({}, {"tensor_parallel": 4}, ""),
        ({}, {"tensor_parallel": 8}, ""),
        ({}, {"pipeline_parallel": 2}, ""),
        ({}, {"pipeline_parallel": 3}, "2 layers can't be shared by pipeline_parallel 3"),
        ({}, {"expert_parallel": True}, "expert_parallel is set, but its config.json has no experts"),
        ({"num_experts": 8}, {"expert_parallel": True, "data_parallel": 2}, ""),
        ({}, {"tensor_parallel": 3}, "8 attention heads can't be shared by tensor_parallel 3"),
        ({"num_key_value_heads": 3}, {"tensor_parallel": 2}, "3 key-value heads"),
        ({"intermediate_size": 511}, {"tensor_parallel": 2}, "intermediate size 511"),
        ({"quantization_config": {**GPTQ, "group_size": 128}}, {"tensor_parallel": 8}, "o_proj: 32 inputs per rank"),
        ({"auto_map": {"AutoModel": "own.Model"}}, {}, "--trust-remote-code"),
        ({"auto_map": {"AutoModel": "own.Model"}}, {"args": ("--trust-remote-code",)}, ""),
        ({}, {"max_model_len": 4096}, ""),
        ({}, {"max_model_len": 4097}, "choose 4096 at most"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, {"max_model_len": 8192}, ""),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, {"max_model_len": 8192}, "choose 4096 at most"),
        ({"rope_parameters": {"full": {"rope_type": "linear"}}}, {"max_model_len": 8192}, ""),
        ({}, {"kv_cache_bytes": "4MiB"}, ""),
        ({}, {"kv_cache_bytes": "3MiB"}, "set kv_cache_bytes to 4MiB or more, or max_model_len to 3072 or less"),
        ({}, {"kv_cache_bytes": "4MiB", "dtype": "float32"}, "kv_cache_bytes to 8MiB"),
        ({}, {"kv_cache_bytes": "2MiB", "kv_cache_dtype": "fp8"}, ""),
        ({"quantization_config": {**FP8_DYNAMIC, "kv_cache_scheme": FP8}}, {"kv_cache_bytes": "2MiB"}, ""),
        ({"sliding_window": 128}, {"kv_cache_bytes": "3MiB"}, ""),
        ({"sliding_window": 128, "use_sliding_window": False}, {"kv_cache_bytes": "3MiB"}, "kv_cache_bytes to 4MiB"),
        ({"max_position_embeddings": 2**20}, {}, "there is 512 MiB"),
        ({"text_config": {"max_position_embeddings": 64}}, {"max_model_len": 65}, "choose 64 at most"),
    ],
)
def test_reasons(config: dict[str, Any], settings: dict[str, Any], word: str) -> None:
    """What vLLM would refuse is refused with the reason and a way out; nothing else is."""
    found = reasons(config, settings)
    assert word in found
    assert bool(found) == bool(word)


@pytest.mark.parametrize(
    "quantization", [{**GPTQ, "bits": 8}, compressed(8), compressed(4, group_size=32), compressed(8, type="float")]
)
def test_gpus_load_more(quantization: dict[str, Any]) -> None:
    """What only a CPU can't do is not refused on a GPU."""
    assert reasons({"quantization_config": quantization}, {}, "cuda") == ""


@pytest.mark.parametrize(
    "quantization,settings,flags,word",
    [
        (None, {}, {"avx2"}, ""),
        (FP8_DYNAMIC, {}, {"avx2"}, ""),
        (INT4_WITH_ZEROS, {}, {"avx2", "avx512f"}, ""),
        (INT4_WITH_ZEROS, {}, {"avx2"}, "a-1: pack-quantized with zero points needs a CPU with avx512f"),
        (FP8_BLOCK, {}, {"avx512f", "amx_tile"}, ""),
        (FP8_BLOCK, {}, {"avx512f"}, "a-1: FP8 needs a CPU with amx_tile"),
        (None, {"kv_cache_dtype": "fp8"}, {"avx512f"}, ""),
        ({**FP8_DYNAMIC, "kv_cache_scheme": FP8}, {}, {"avx2"}, "a-1: kv_cache_dtype fp8 needs AVX-512"),
        (None, {"kv_cache_dtype": "fp8"}, {"avx2"}, "a-1: kv_cache_dtype fp8 needs AVX-512 or AMX"),
    ],
)
def test_instruction_sets(
    quantization: dict[str, Any] | None, settings: dict[str, Any], flags: set[str], word: str
) -> None:
    """What only some CPUs load is held against this one."""
    config: dict[str, Any] = {"quantization_config": quantization} if quantization else {}
    machine = MachineFacts(99 * GIB, flags=frozenset(flags))
    found = oversubscribed([(launch(**settings), model(**config))], machine)
    assert word in "\n".join(found)
    assert bool(found) == bool(word)


def test_files_that_mislead() -> None:
    """A stray modules.json is told, because vLLM would take the model for an embedder."""
    assert "modules.json" in reasons({}, {}, files=frozenset({"modules.json", "config.json"}))


@pytest.mark.parametrize(
    "parser,tokens,refused",
    [
        ("deepseek_r1", {"<s>"}, True),
        ("deepseek_r1", {"<think>", "</think>"}, False),
        ("deepseek_r1", set(), False),
        ("qwen3", {"<s>"}, False),
        (None, {"<s>"}, False),
    ],
)
def test_think_tokens(parser: str | None, tokens: set[str], refused: bool) -> None:
    """A parser that looks for think tokens is refused where the tokenizer has none; unknown is no reason."""
    assert bool(reasons({}, {}, parser=parser, special_tokens=frozenset(tokens))) == refused


@pytest.mark.parametrize(
    "count,free,refused",
    [(1, 3.3, False), (1, 3.2, True), (4, 13.1, False), (4, 12.9, True)],
)
def test_memory_adds_up(count: int, free: float, refused: bool) -> None:
    """Weights, KV cache and overhead of all replicas are held against what is free."""
    pairs = [(launch(f"a-{number}"), model()) for number in range(count)]
    found = oversubscribed(pairs, MachineFacts(int(free * GIB)))
    assert bool(found) == refused
    if refused:
        assert f"need about {count * 3.25:.1f} GiB of memory (a-0 3.2 GiB" in found[0]


def gpu(index: int = 0, free: float = 79) -> Gpu:
    """An 80 GiB card."""
    return Gpu(index, "H100", 80 * GIB, int(free * GIB), "570")


@pytest.mark.parametrize(
    "launches,gpus,weights,word",
    [
        ([launch(engine="cuda", gpus=(0,))], [gpu()], 10, ""),
        ([launch(engine="cuda", gpus=(0,))], [gpu()], 73, "0 (H100): weights 73.0 GiB"),
        ([launch(engine="cuda", gpus=(0, 1), tensor_parallel=2)], [gpu(), gpu(1)], 100, ""),
        ([launch(engine="cuda", gpus=(0, 1), tensor_parallel=2)], [gpu(), gpu(1)], 146, "GPU 1 (H100): weights 73.0"),
        ([launch(engine="cuda", gpus=(0,))], [gpu(free=40)], 1, "--gpu-memory-utilization 0.49"),
        ([launch(engine="cuda", gpus=(0,), args=("--gpu-memory-utilization", "0.4"))], [gpu(free=40)], 1, ""),
        ([launch(engine="cuda", gpus=(0,), args=("--gpu-memory-utilization=0.4",))], [gpu(free=40)], 31, "weights"),
        ([launch(engine="cuda", gpus=(3,))], [gpu()], 1, "there is no GPU 3 here; there are 0"),
        ([launch(engine="cuda", gpus=(3,))], [], 1, ""),
        ([launch(engine="cuda")], [gpu()], 1, ""),
        ([launch(engine="cuda", tensor_parallel=2)], [gpu()], 1, "a-1: needs 2 GPUs (tensor_parallel 2)"),
        ([launch(engine="cuda", tensor_parallel=2, data_parallel=2)], [gpu(), gpu(1)], 1, "needs 4 GPUs"),
        ([launch(engine="cuda", gpus=(0, 1), pipeline_parallel=2)], [gpu(), gpu(1)], 100, ""),
        # Every engine of a data-parallel server has all weights, but with expert_parallel they share the experts.
        ([launch(engine="cuda", gpus=(0, 1), data_parallel=2)], [gpu(), gpu(1)], 100, "GPU 0 (H100): weights 100.0"),
        ([launch(engine="cuda", gpus=(0, 1), data_parallel=2, expert_parallel=True)], [gpu(), gpu(1)], 100, ""),
        ([launch(engine="cuda"), launch("a-2", "cuda")], [gpu()], 1, "a-1, a-2 would all run on the first GPU"),
    ],
)
def test_gpus(launches: list[Launch], gpus: list[Gpu], weights: int, word: str) -> None:
    """GPUs that aren't there, are shared by accident or too small are refused before anything is loaded."""
    found = oversubscribed([(each, model(weights * GIB)) for each in launches], MachineFacts(0, gpus=tuple(gpus)))
    assert word in "\n".join(found)
    assert bool(found) == bool(word)


@pytest.mark.parametrize(
    "launches,busy,word",
    [
        ([launch(port=8101)], set(), ""),
        ([launch(port=8101)], {8101}, "a-1: port 8101 is in use"),
        ([launch(port=8101), launch("a-2", port=8101)], set(), "a-2: port 8101 is also another"),
        ([launch(), launch("a-2")], set(), ""),
    ],
)
def test_ports(launches: list[Launch], busy: set[int], word: str) -> None:
    """A port that somebody has, or that two replicas want, is told."""
    found = oversubscribed([(each, model()) for each in launches], MachineFacts(99 * GIB, busy_ports=frozenset(busy)))
    assert word in "\n".join(found)
    assert bool(found) == bool(word)


def test_automatic_binding_needs_nodes() -> None:
    """vLLM's own binding gives each rank a NUMA node, so there must be as many."""
    pairs = [(launch(tensor_parallel=2, cores="auto"), model())]
    assert "NUMA" in oversubscribed(pairs, MachineFacts(99 * GIB, numa_nodes=1))[0]
    assert oversubscribed(pairs, MachineFacts(99 * GIB, numa_nodes=2)) == []
