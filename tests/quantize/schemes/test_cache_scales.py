"""Scales of an FP8 KV cache: which layers have them, under which names, and which bases are refused."""

from dataclasses import replace
from typing import Any

import pytest

from config.manifest import Engine
from quantize.schemes.cache_scales import FP8_CACHE, attention_names, cache_misfit, scale_names, token_bytes
from quantize.schemes.forecast import predicted_bytes
from quantize.schemes.makers import require_made
from quantize.schemes.scheme import faults, named, nearest_loadable, preset
from tests.quantize.shapes import QWQ_32B

W8A8 = preset("w8a8").model_copy(update={"kv_cache": FP8_CACHE})


@pytest.mark.parametrize(
    "stored,expected",
    [
        (["model.layers.1.self_attn.k_proj.weight", "model.layers.0.self_attn.k_proj.weight"], (0, 1)),
        (["model.layers.0.self_attn.qkv_proj.weight"], (0,)),
        (["model.layers.0.self_attn.k_proj.weight_packed", "model.layers.0.self_attn.k_proj.weight_scale"], (0,)),
        (["model.layers.2.self_attn.k_proj.weight"], ()),  # beyond the decoder: multi-token prediction
        (["model.layers.0.linear_attn.in_proj_qkv.weight", "model.layers.1.self_attn.k_proj.weight"], (1,)),
        (["model.vision_tower.layers.0.self_attn.k_proj.weight"], ()),
        (["model.layers.0.mlp.up_proj.weight", "lm_head.weight"], ()),
    ],
)
def test_layers_with_keys_and_values_are_found(stored: list[str], expected: tuple[int, ...]) -> None:
    """By the matrices that make keys, of the decoder's own layers, in order."""
    assert attention_names(stored, 2) == tuple(f"model.layers.{layer}.self_attn" for layer in expected)


def test_names_are_those_that_vllm_maps() -> None:
    """Two numbers for each layer of QwQ-32B, which the forecast counts."""
    names = scale_names(QWQ_32B)
    assert len(names) == 64
    assert names["layers.63.self_attn"] == ("model.layers.63.self_attn.k_scale", "model.layers.63.self_attn.v_scale")
    assert predicted_bytes(QWQ_32B, W8A8) == predicted_bytes(QWQ_32B, preset("w8a8")) + 64 * 2 * 4


def test_a_token_takes_half_the_cache() -> None:
    """64 layers, 8 heads of 128, keys and values: 262,144 bytes in bf16."""
    assert token_bytes(preset("w8a8"), QWQ_32B) == (262_144, 262_144)
    assert token_bytes(W8A8, QWQ_32B) == (131_072, 262_144)


@pytest.mark.parametrize(
    "changes,engine,problem",
    [
        ({}, "cpu", None),
        ({"head_dim": 80}, "cuda", None),
        ({"head_dim": 80}, "cpu", "its head size is 80, and vLLM's FP8 cache on CPU takes multiples of 32"),
        ({"kv_lora_rank": 512}, "cuda", "latents"),
        ({"num_kv_shared_layers": 10}, "cuda", "64 of its 64 layers have keys and values of their own"),
        ({"num_hidden_layers": 96}, "cuda", "64 of its 96 layers"),
    ],
)
def test_bases_without_plain_keys_and_values_are_refused(
    changes: dict[str, Any], engine: Engine, problem: str | None
) -> None:
    """Their scales would be of something else than vLLM caches."""
    base = replace(QWQ_32B, config={**QWQ_32B.config, **changes})
    found = cache_misfit(W8A8, base, engine)
    assert found is None if problem is None else problem in str(found)
    assert cache_misfit(preset("w8a8"), base, engine) is None


@pytest.mark.parametrize("name", ["w8a8", "fp8-dynamic", "w4a16-asym"])
def test_schemes_with_scales_are_made(name: str) -> None:
    """Their names say so, and nothing else about them changes."""
    scheme = named(preset(name).model_copy(update={"kv_cache": FP8_CACHE}))
    assert scheme.name == f"{name}-kv-fp8"
    assert faults(scheme) == []
    require_made(scheme)


@pytest.mark.parametrize("name", ["w4a16-g128", "fp8-block"])
def test_schemes_beside_which_no_scales_load(name: str) -> None:
    """The nearest that loads is the same without them."""
    scheme = named(preset(name).model_copy(update={"kv_cache": FP8_CACHE}))
    assert "vLLM loads scales of an FP8 KV cache beside compressed-tensors" in faults(scheme)[0]
    assert nearest_loadable(scheme) == preset(name)
