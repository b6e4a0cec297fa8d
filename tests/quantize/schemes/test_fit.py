"""Which models a scheme fits: groups, fused layers, exceptions, shares of several GPUs."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.manifest import Override, Scheme
from quantize.errors import RecipeError
from quantize.schemes.fit import (
    Heads,
    fitted,
    heads_of,
    misfit,
    tensor_parallel_degrees,
    uneven_share,
    unevenly_fused,
)
from quantize.schemes.module_config import fused_name
from quantize.schemes.scheme import preset
from tests.quantize.shapes import QWEN_72B, QWQ_32B

SMOL = {
    "model.layers.0.self_attn.q_proj": (576, 576),
    "model.layers.0.mlp.down_proj": (576, 1536),
}


def mixed(name: str, *overrides: Override) -> Scheme:
    """A preset with exceptions."""
    return preset(name).model_copy(update={"overrides": overrides})


@pytest.mark.parametrize(
    "name,problem",
    [
        ("w4a16-g64", None),
        ("w4a16-g32", None),
        ("w8a8", None),
        ("w4a16-g128", "hidden size 576 is not divisible by 128; use w4a16-g64"),
        ("w8a16-g128", "hidden size 576 is not divisible by 128; use w8a16-channel"),
    ],
)
def test_a_misfit_names_the_dimension_and_the_preset_that_fits(name: str, problem: str | None) -> None:
    """A group size that doesn't divide a dimension is told with the reader's word for the dimension."""
    assert misfit(preset(name), SMOL, {"hidden size": 576, "intermediate size": 1536}) == problem


def test_a_misfit_in_an_unnamed_dimension_names_the_layer() -> None:
    """A dimension without a word of its own is told by its layer."""
    shapes = {"model.layers.0.mlp.down_proj": (64, 80)}
    assert misfit(preset("w4a16-g64"), shapes, {}) == (
        "the input of model.layers.0.mlp.down_proj, 80 is not divisible by 64; no preset of these bits fits this model"
    )


def test_odd_outputs_fit_no_kernel() -> None:
    """An output that is no multiple of the kernels' tile is refused."""
    reason = misfit(preset("w8a8"), {"model.layers.0.q": (40, 64)}, {})
    assert reason is not None
    assert "the output of model.layers.0.q, 40, is not divisible by 32" in reason


@pytest.mark.parametrize(
    "override,fits",
    [
        (Override(modules="*.q_proj"), True),
        (Override(modules="*.q_proj", bits=4, group_size=64), True),
        (Override(modules="*.q_proj", bits=8), False),
        (Override(modules="*.down_proj", bits=8, group_size=32), False),
    ],
)
def test_exceptions_count_for_the_fit(override: Override, fits: bool) -> None:
    """A module that is kept, or has narrower groups, fits where the scheme's own group doesn't."""
    assert (misfit(mixed("w4a16-g128", override), SMOL, {}) is None) == fits


@pytest.mark.parametrize(
    "module,expected",
    [
        ("model.layers.3.self_attn.k_proj", "model.layers.3.self_attn.qkv_proj"),
        ("model.layers.3.mlp.up_proj", "model.layers.3.mlp.gate_up_proj"),
        ("model.layers.3.mlp.down_proj", "model.layers.3.mlp.down_proj"),
        ("model.layers.3.mlp.experts.17.down_proj", "model.layers.3.mlp.experts"),
    ],
)
def test_fused_names(module: str, expected: str) -> None:
    """Parts of what vLLM loads as one matrix have one name."""
    assert fused_name(module) == expected


@pytest.mark.parametrize(
    "overrides,problem",
    [
        ([], None),
        ([Override(modules="*.down_proj", bits=8)], None),
        ([Override(modules="*.[qkv]_proj", bits=8)], None),
        ([Override(modules="*.layers.0.*")], None),
        ([Override(modules="*.v_proj", bits=8)], "q_proj (4 bits, group 128) and v_proj (8 bits, group 128)"),
        ([Override(modules="*.up_proj")], "gate_proj (4 bits, group 128) and up_proj (kept)"),
        ([Override(modules="*.gate_proj", bits=4, group_size=32)], "gate_proj (4 bits, group 32) and up_proj"),
    ],
)
def test_what_is_fused_has_the_same_numbers(overrides: list[Override], problem: str | None) -> None:
    """q, k and v, and gate and up, go together; everything else is free."""
    reason = unevenly_fused(mixed("w4a16-g128", *overrides), QWQ_32B.shapes)
    assert reason is None if problem is None else problem in str(reason)


def test_exceptions_that_change_nothing_are_dropped() -> None:
    """`lm_head: keep` is what happens anyway: the scheme, and so the variant's name, stays the same."""
    assert fitted(mixed("w4a16-g128", Override(modules="lm_head")), QWQ_32B) == preset("w4a16-g128")
    kept = fitted(mixed("w4a16-g128", Override(modules="lm_head"), Override(modules="*.down_proj", bits=8)), QWQ_32B)
    assert (kept.name, len(kept.overrides)) == ("w4a16-g128-mixed", 1)


@pytest.mark.parametrize(
    "overrides,problem",
    [
        ([Override(modules="*.dwn_proj", bits=8)], "'*.dwn_proj' matches no module of QwQ-32B; write a shell pattern"),
        ([Override(modules="down_proj", bits=8)], "like '*.down_proj'"),
        ([Override(modules="lm_head", bits=8)], "only linear layers inside the blocks are quantized"),
        (
            [Override(modules="*_proj", bits=8), Override(modules="*.down_proj")],
            "'*.down_proj' never applies: earlier ones, like '*_proj', match its modules",
        ),
    ],
)
def test_an_exception_without_effect_is_a_mistake(overrides: list[Override], problem: str) -> None:
    """A pattern that was meant to do something and doesn't is told."""
    with pytest.raises(RecipeError) as caught:
        fitted(mixed("w4a16-g128", *overrides), QWQ_32B)
    assert problem in str(caught.value)


def test_qwq_is_shared_by_up_to_8_gpus() -> None:
    """27648 = 216 groups of 128 and 40 heads: 1, 2, 4, 8 GPUs; 16 would have half heads."""
    assert tensor_parallel_degrees(QWQ_32B.shapes, preset("w4a16-g128"), heads_of(QWQ_32B)) == (1, 2, 4, 8)


def test_qwen_72b_at_group_128_runs_on_one_gpu_only() -> None:
    """29568 inputs are 231 groups: the case that Qwen's documentation warns of, with module and numbers."""
    assert tensor_parallel_degrees(QWEN_72B.shapes, preset("w4a16-g128"), heads_of(QWEN_72B)) == (1,)
    assert uneven_share(QWEN_72B.shapes, preset("w4a16-g128"), 2, heads_of(QWEN_72B)) == (
        "model.layers.0.mlp.down_proj: 29568 inputs are 231 groups of 128, which 2 GPUs can't share evenly"
    )
    assert 2 in tensor_parallel_degrees(QWEN_72B.shapes, preset("w4a16-g32"), heads_of(QWEN_72B))


@pytest.mark.parametrize(
    "heads,degree,problem",
    [
        (Heads(40, 8), 3, "40 attention heads"),
        (Heads(40, 8), 5, "8 key-value heads"),
        (Heads(40, 8), 8, None),
        (Heads(32, 2), 4, None),
        (None, 5, None),
    ],
)
def test_heads_stay_whole(heads: Heads | None, degree: int, problem: str | None) -> None:
    """Each GPU has whole heads; key-value heads may be copied."""
    reason = uneven_share({"model.layers.0.self_attn.q_proj": (9600, 9600)}, preset("w4a16-g64"), degree, heads)
    assert reason is None if problem is None else problem in str(reason)


@given(st.sampled_from([32, 64, 128]), st.integers(1, 64), st.integers(1, 16))
def test_shares_hold_whole_groups(group_size: int, groups: int, degree: int) -> None:
    """A row-parallel layer is shared exactly where its groups are."""
    shapes = {"model.layers.0.mlp.down_proj": (64, groups * group_size)}
    even = uneven_share(shapes, preset(f"w4a16-g{group_size}"), degree) is None
    assert even == (groups % degree == 0)


def test_unknown_heads_limit_nothing() -> None:
    """A config without heads has no say."""
    assert heads_of(replace(QWQ_32B, config={})) == Heads()
    assert heads_of(replace(QWQ_32B, config={"num_attention_heads": 4})) == Heads(4, 4)


@pytest.mark.parametrize(
    "shapes,degree,heads",
    [
        # Mixtral 8x7B, Qwen2-57B-A14B, DeepSeek-V3, Qwen3-235B-A22B
        ({"model.layers.0.block_sparse_moe.gate": (8, 4096), "model.layers.0.self_attn.q_proj": (4096, 4096)}, 2, 32),
        ({"model.layers.0.mlp.shared_expert_gate": (1, 3584), "model.layers.0.self_attn.q_proj": (3584, 3584)}, 4, 28),
        ({"l.kv_a_proj_with_mqa": (576, 7168), "l.o_proj": (7168, 16384)}, 8, 128),
        ({"model.layers.0.mlp.gate": (128, 4096), "model.layers.0.self_attn.q_proj": (8192, 4096)}, 16, 64),
    ],
)
def test_replicated_layers_fit(shapes: dict[str, tuple[int, int]], degree: int, heads: int) -> None:
    """Routers are never quantized, and each GPU has them whole, as the down-projections of latent attention."""
    scheme = preset("w4a16-g128")
    assert misfit(scheme, {name: shape for name, shape in shapes.items() if "kv_a_proj" not in name}, {}) is None
    assert uneven_share(shapes, scheme, degree, Heads(heads, heads)) is None
