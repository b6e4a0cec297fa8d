"""Schemes: names, engines, and which models they fit."""

import pytest

from quantize.errors import RecipeError
from quantize.scheme import PRESETS, misfit, preset, refusals, require_engine

SMOL = {
    "model.layers.0.self_attn.q_proj": (576, 576),
    "model.layers.0.mlp.down_proj": (576, 1536),
}


@pytest.mark.parametrize(
    "name,bits,group_size,activation_bits,form",
    [
        ("w4a16-g128", 4, 128, 16, "gptq"),
        ("w4a16-g64", 4, 64, 16, "gptq"),
        ("w4a16-g32", 4, 32, 16, "gptq"),
        ("w8a16-g128", 8, 128, 16, "gptq"),
        ("w8a16-channel", 8, -1, 16, "gptq"),
        ("w8a8", 8, -1, 8, "compressed-tensors"),
    ],
)
def test_presets_say_what_their_names_say(
    name: str, bits: int, group_size: int, activation_bits: int, form: str
) -> None:
    """A preset's numbers are those of its name, symmetric and without activation order."""
    scheme = preset(name)
    assert (scheme.bits, scheme.group_size, scheme.activation_bits, scheme.format) == (
        bits,
        group_size,
        activation_bits,
        form,
    )
    assert scheme.sym
    assert not scheme.desc_act
    assert scheme.precision == f"int{bits}"


@pytest.mark.parametrize(
    "asked,meant", [("w4a16-g46", "w4a16-g64"), ("w8a8s", "w8a8"), ("w4a16_g128", "w4a16-g128"), ("W8A8", "w8a8")]
)
def test_a_misspelt_scheme_is_told_its_nearest_name(asked: str, meant: str) -> None:
    """An unknown scheme's error proposes the preset that was most likely meant."""
    with pytest.raises(RecipeError, match=f"did you mean {meant}\\?"):
        preset(asked)


def test_a_strange_scheme_gets_the_list() -> None:
    """A name that resembles nothing is answered with all names."""
    with pytest.raises(RecipeError, match=r"w4a16-g128, .*w8a8") as caught:
        preset("zzz")
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize("name", PRESETS)
def test_cuda_loads_every_preset(name: str) -> None:
    """No preset is refused on CUDA."""
    assert "cuda" not in refusals(preset(name))
    require_engine(preset(name), "cuda")


@pytest.mark.parametrize(
    "name,loads",
    [
        ("w4a16-g128", True),
        ("w4a16-g64", True),
        ("w4a16-g32", True),
        ("w8a8", True),
        ("w8a16-g128", False),
        ("w8a16-channel", False),
    ],
)
def test_cpu_refuses_8_bit_gptq_and_points_to_w8a8(name: str, loads: bool) -> None:
    """8-bit GPTQ has no CPU kernel; the reason names the scheme that has."""
    assert ("cpu" not in refusals(preset(name))) == loads
    if not loads:
        with pytest.raises(RecipeError, match="w8a8"):
            require_engine(preset(name), "cpu")


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
