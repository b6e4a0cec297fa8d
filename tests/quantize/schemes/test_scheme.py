"""Schemes: names, what vLLM loads of them, and the nearest that it loads."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from config.manifest import Override, Scheme
from quantize.errors import RecipeError
from quantize.schemes.scheme import PRESETS, faults, named, nearest_loadable, preset, require_loadable

FREE = st.builds(
    dict,
    name=st.just("free"),
    bits=st.integers(1, 16),
    group_size=st.integers(-1, 1024),
    sym=st.booleans(),
    desc_act=st.booleans(),
    activation_bits=st.sampled_from([8, 16]),
    format=st.sampled_from(["gptq", "compressed-tensors"]),
    overrides=st.lists(
        st.builds(
            Override,
            modules=st.sampled_from(["*.q_proj", "*"]),
            bits=st.sampled_from([None, 4, 8]),
            group_size=st.none() | st.integers(-1, 512),
        ),
        max_size=2,
    ).map(tuple),
).map(Scheme.model_validate)
GROUPS_IN_AN_OVERRIDE = Scheme.model_validate(
    {
        "name": "free",
        "bits": 1,
        "group_size": 0,
        "sym": False,
        "desc_act": True,
        "activation_bits": 8,
        "format": "gptq",
        "overrides": (Override(modules="*.q_proj", bits=4, group_size=1),),
    }
)
GPTQ = preset("w4a16-g128").model_dump(include={"bits", "group_size", "sym", "desc_act", "activation_bits", "format"})


def changed(**change: object) -> Scheme:
    """w4a16-g128 with other numbers, in the keys of manifests that have no other ones."""
    return Scheme.model_validate({**GPTQ, "name": "asked", **change})


@pytest.mark.parametrize(
    "name,bits,group_size,activation_bits,form,precision",
    [
        ("w4a16-g128", 4, 128, 16, "gptq", "int4"),
        ("w4a16-g64", 4, 64, 16, "gptq", "int4"),
        ("w4a16-g32", 4, 32, 16, "gptq", "int4"),
        ("w8a16-g128", 8, 128, 16, "gptq", "int8"),
        ("w8a16-channel", 8, -1, 16, "gptq", "int8"),
        ("w8a8", 8, -1, 8, "compressed-tensors", "int8"),
        ("fp8-dynamic", 8, -1, 8, "compressed-tensors", "fp8"),
        ("fp8-block", 8, 128, 8, "fp8", "fp8"),
        ("w4a16-asym", 4, 128, 16, "compressed-tensors", "int4"),
        ("w4a16-asym-g64", 4, 64, 16, "compressed-tensors", "int4"),
        ("nvfp4a16", 4, 16, 16, "compressed-tensors", "fp4"),
        ("mxfp4", 4, 32, 16, "compressed-tensors", "fp4"),
    ],
)
def test_presets_say_what_their_names_say(
    name: str, bits: int, group_size: int, activation_bits: int, form: str, precision: str
) -> None:
    """A preset's numbers are those of its name, symmetric unless it says otherwise, and without activation order."""
    scheme = preset(name)
    assert (scheme.bits, scheme.group_size, scheme.activation_bits, scheme.format) == (
        bits,
        group_size,
        activation_bits,
        form,
    )
    assert scheme.sym == ("asym" not in name)
    assert not scheme.desc_act
    assert scheme.precision == precision


@pytest.mark.parametrize(
    "asked,meant", [("w4a16-g46", "w4a16-g64"), ("w8a8s", "w8a8"), ("w4a16_g128", "w4a16-g128"), ("W8A8", "w8a8")]
)
def test_a_misspelt_scheme_is_told_its_nearest_name(asked: str, meant: str) -> None:
    """An unknown scheme's error proposes the preset that was most likely meant."""
    with pytest.raises(RecipeError, match=f"did you mean {meant}\\?"):
        preset(asked)


def test_a_strange_scheme_gets_the_list() -> None:
    """A name that resembles nothing is answered with all names."""
    with pytest.raises(RecipeError, match=r"w4a16-g128, .*w8a8, .*, auto") as caught:
        preset("zzz")
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_loads(name: str) -> None:
    """No preset is refused, and none has a nearer one."""
    require_loadable(preset(name))
    assert nearest_loadable(preset(name)) == preset(name)


@pytest.mark.parametrize(
    "change,reason,nearest",
    [
        ({"bits": 3}, "vLLM loads GPTQ of 4 or 8 bits, not of 3", "w4a16-g128"),
        ({"bits": 2, "group_size": 64}, "not of 2", "w4a16-g64"),
        ({"bits": 6}, "not of 6", "w8a16-g128"),
        ({"group_size": 16}, "groups of 32, 64, 128 or -1 (all inputs), not of 16", "w4a16-g32"),
        ({"group_size": 1024}, "not of 1024", "w4a16-g128"),
        ({"group_size": 96}, "not of 96", "w4a16-g64"),
        ({"sym": False}, "symmetric GPTQ only", "w4a16-g128"),
        ({"desc_act": True}, "no longer loads GPTQ with desc_act (actorder: group) and groups", "w4a16-g128"),
        ({"activation_bits": 8}, "with none activations, not int8", "w4a16-g128"),
        ({"bits": 8, "activation_bits": 8}, "with none activations, not int8", "w8a8"),
        ({"format": "compressed-tensors", "activation_bits": 8}, "int-quantized of 8 bits, not of 4", "w8a8"),
        ({"overrides": (Override(modules="*.q_proj", bits=4, group_size=48),)}, "GPTQ (*.q_proj) in groups", "-mixed"),
    ],
)
def test_what_no_vllm_loads_is_refused_with_the_nearest(change: dict[str, object], reason: str, nearest: str) -> None:
    """The message has the reason and a scheme that loads."""
    with pytest.raises(RecipeError) as caught:
        require_loadable(changed(**change))
    told = str(caught.value)
    assert told.startswith("scheme asked loads nowhere: ")
    assert reason in told
    assert nearest in told.partition("the nearest that loads is ")[2]


def test_desc_act_with_one_group_changes_nothing_and_loads() -> None:
    """With one group for all inputs, their order is no matter of the file."""
    assert faults(preset("w8a16-channel").with_weights(actorder="group")) == []


def test_w8a8_keeps_modules_but_has_no_other_numbers() -> None:
    """Compressed-tensors takes `keep` only."""
    kept = preset("w8a8").model_copy(update={"overrides": (Override(modules="*.o_proj"),)})
    assert faults(kept) == []
    mixed = preset("w8a8").model_copy(update={"overrides": (Override(modules="*.o_proj", bits=4),)})
    assert faults(mixed) == ["w8a8 has no exceptions but `keep`, and *.o_proj asks for other numbers"]


@example(GROUPS_IN_AN_OVERRIDE)
@given(FREE)
def test_the_nearest_always_loads_and_is_its_own_nearest(scheme: Scheme) -> None:
    """Whatever is asked for, the proposal is no dead end."""
    nearest = nearest_loadable(scheme)
    assert faults(nearest) == []
    assert nearest_loadable(nearest) == nearest
    if not faults(scheme):
        assert nearest == named(scheme)


@pytest.mark.parametrize(
    "change,name",
    [
        ({}, "w4a16-g128"),
        ({"bits": 8, "group_size": -1}, "w8a16-channel"),
        ({"bits": 8, "group_size": 32}, "w8a16-g32"),
        ({"group_size": -1}, "w4a16-channel"),
        ({"overrides": (Override(modules="*.down_proj", bits=8),)}, "w4a16-g128-mixed"),
    ],
)
def test_numbers_give_the_name(change: dict[str, object], name: str) -> None:
    """A preset's numbers have the preset's name, others one of the same kind; exceptions show in it."""
    assert named(changed(**change)).name == name
