"""Units: what shares numbers in vLLM, what each may get, and a scheme that gives every module its own."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.manifest import Engine, Override
from quantize.errors import RecipeError
from quantize.mixed_precision.module_groups import ModuleGroup, kinds_of, module_groups_of, written
from quantize.schemes.engines import require_engine
from quantize.schemes.fit import heads_of, misfit, uneven_share
from quantize.schemes.forecast import predicted_bytes
from quantize.schemes.module_config import WeightArgs, weight_args_of
from quantize.schemes.scheme import require_loadable
from tests.quantize.shapes import QWQ_32B, qwen2

FOUR = (WeightArgs(4, -1), WeightArgs(4, 128), WeightArgs(4, 64), WeightArgs(4, 32))
EIGHT = (WeightArgs(8, -1), WeightArgs(8, 128), WeightArgs(8, 64), WeightArgs(8, 32))
SMALL = qwen2("small", layers=12, hidden=576, inner=1536, heads=4, kv_heads=2, vocabulary=64)
NAMES = list(SMALL.shapes)
UNITS = module_groups_of(SMALL.shapes, "cuda")
BLOCK = "model.layers.3"


def module_groups(engine: Engine = "cuda", *overrides: Override, degree: int = 1) -> dict[str, ModuleGroup]:
    """The units of a small model, by name."""
    found = module_groups_of(SMALL.shapes, engine, overrides, tensor_parallel=degree, heads=heads_of(SMALL))
    return {module_group.name: module_group for module_group in found}


def test_what_is_one_matrix_is_one_unit() -> None:
    """Four units a layer, and every module in exactly one."""
    assert list(module_groups())[:4] == [
        "model.layers.0.self_attn.qkv_proj",
        "model.layers.0.self_attn.o_proj",
        "model.layers.0.mlp.gate_up_proj",
        "model.layers.0.mlp.down_proj",
    ]
    assert sorted(module for module_group in UNITS for module in module_group.modules) == sorted(NAMES)
    assert len(UNITS) == 4 * 12


def test_kinds_differ_in_their_layer_alone() -> None:
    """Four kinds; a unit that an override gives other choices is a kind of its own."""
    kinds = kinds_of(UNITS)
    assert [len(groups) for groups in kinds.values()] == [12] * 4
    assert sorted(group.name for groups in kinds.values() for group in groups) == sorted(group.name for group in UNITS)
    found = kinds_of(tuple(module_groups("cuda", Override(modules="*.layers.0.mlp.down_proj", bits=8)).values()))
    assert sorted(len(groups) for groups in found.values()) == [1, 11, 12, 12, 12]


def test_a_module_of_another_architecture_is_its_own_unit() -> None:
    """Names that vLLM doesn't fuse stay alone."""
    found = module_groups_of({"h.0.mlp.c_fc": (256, 128), "h.0.attn.c_proj": (128, 128)}, "cpu")
    assert [module_group.modules for module_group in found] == [("h.0.mlp.c_fc",), ("h.0.attn.c_proj",)]


@pytest.mark.parametrize(
    "engine,name,choices",
    [
        ("cuda", "mlp.down_proj", FOUR + EIGHT),
        ("cpu", "mlp.down_proj", FOUR),
        ("cpu", "mlp.gate_up_proj", FOUR[:1] + FOUR[2:]),  # 576 = 9 * 64
        ("cuda", "self_attn.qkv_proj", FOUR[:1] + FOUR[2:] + EIGHT[:1] + EIGHT[2:]),
    ],
)
def test_a_unit_may_have_what_loads_and_fits(engine: Engine, name: str, choices: Sequence[WeightArgs]) -> None:
    """No 8 bits on a CPU, no group that doesn't divide the inputs; the smallest file first."""
    assert module_groups(engine)[f"{BLOCK}.{name}"].choices == tuple(choices)


def test_gpus_share_whole_groups() -> None:
    """1536 inputs are six groups of 128 on each of two GPUs, but not on each of eight."""
    wide = qwen2("wide", layers=1, hidden=1024, inner=1536, heads=8, kv_heads=8, vocabulary=64)
    found = {
        degree: module_groups_of(wide.shapes, "cpu", tensor_parallel=degree, heads=heads_of(wide))[-1].choices
        for degree in (1, 2, 8)
    }
    assert found == {1: FOUR, 2: FOUR, 8: FOUR[:1] + FOUR[2:]}


@pytest.mark.parametrize(
    "override,choices",
    [
        (Override(modules="*.down_proj", bits=8), (WeightArgs(8, 128),)),
        (Override(modules="*.down_proj", bits=4), (WeightArgs(4, 128),)),
        (Override(modules="*.down_proj", bits=4, group_size=32), (WeightArgs(4, 32),)),
        (Override(modules="*.down_proj", bits=8, group_size=-1), (WeightArgs(8, -1),)),
    ],
)
def test_an_override_leaves_one_choice(override: Override, choices: tuple[WeightArgs, ...]) -> None:
    """Without a group, the widest that fits; other units keep theirs."""
    found = module_groups("cuda", override)
    assert found[f"{BLOCK}.mlp.down_proj"].choices == choices
    assert found[f"{BLOCK}.mlp.gate_up_proj"] == module_groups()[f"{BLOCK}.mlp.gate_up_proj"]


def test_what_an_override_keeps_is_in_no_unit() -> None:
    """It has no numbers."""
    assert len(module_groups("cuda", Override(modules="*.layers.3.*"))) == 4 * 11


@pytest.mark.parametrize(
    "override,degree,problem",
    [
        (
            Override(modules="*.q_proj", bits=8),
            1,
            r"override '\*.q_proj' tells model.layers.0.self_attn.q_proj and model.layers.0.self_attn.k_proj apart, "
            "which vLLM loads as one matrix; write a pattern that matches both",
        ),
        (Override(modules="*.up_proj"), 1, "tells model.layers.0.mlp.gate_proj and model.layers.0.mlp.up_proj apart"),
        (
            Override(modules="*.down_proj", bits=4, group_size=128),
            8,
            r"down_proj: nothing that loads on engine cuda fits it, or override '\*.down_proj' asks for too much",
        ),
    ],
)
def test_an_override_that_can_t_be_met_is_refused(override: Override, degree: int, problem: str) -> None:
    """One line with the names."""
    wide = qwen2("wide", layers=1, hidden=1024, inner=1536, heads=8, kv_heads=8, vocabulary=64)
    with pytest.raises(RecipeError, match=problem):
        module_groups_of(wide.shapes, "cuda", [override], tensor_parallel=degree, heads=heads_of(wide))


def test_a_search_needs_something_to_choose() -> None:
    """A scheme of nothing but exceptions is none."""
    with pytest.raises(RecipeError, match="the overrides keep all linear layers; keep fewer"):
        module_groups("cuda", Override(modules="*"))


def test_eight_bits_on_a_cpu_are_refused() -> None:
    """An override can't ask for what has no kernel."""
    with pytest.raises(RecipeError, match="nothing that loads on engine cpu fits it, or override"):
        module_groups("cpu", Override(modules="*.down_proj", bits=8))


@given(data=st.data(), kept=st.sets(st.integers(0, 11), max_size=3), zero_points=st.booleans())
def test_a_written_scheme_gives_every_module_its_numbers(
    data: st.DataObject, kept: set[int], *, zero_points: bool
) -> None:
    """Whatever was chosen, every module gets it by the first override that matches; vLLM can load the result."""
    overrides = [Override(modules=f"model.layers.{layer}.*") for layer in sorted(kept)]
    found = module_groups_of(SMALL.shapes, "cuda", overrides, zero_points=zero_points)
    chosen = {module_group.name: data.draw(st.sampled_from(module_group.choices)) for module_group in found}
    scheme = written(found, chosen, NAMES, zero_points=zero_points)
    wanted = {module: chosen[module_group.name] for module_group in found for module in module_group.modules}
    assert {name: weight_args_of(name, scheme) for name in NAMES} == {name: wanted.get(name) for name in NAMES}
    assert scheme.bits == min(weight_args.bits for weight_args in chosen.values())
    assert misfit(scheme, SMALL.shapes, {}) is None
    require_loadable(scheme)
    require_engine(scheme, "cuda")


def test_a_scheme_is_written_in_few_words() -> None:
    """What most layers have is one line, an exception another; what is like the scheme's own needs none."""
    chosen = {
        module_group.name: WeightArgs(8, 128) if "down" in module_group.name else WeightArgs(4, 64)
        for module_group in UNITS
    }
    chosen["model.layers.3.mlp.down_proj"] = WeightArgs(4, 32)
    chosen["model.layers.10.self_attn.qkv_proj"] = WeightArgs(8, 64)
    chosen["model.layers.11.mlp.gate_up_proj"] = WeightArgs(8, 64)
    scheme = written(UNITS, chosen, NAMES)
    assert (scheme.name, scheme.bits, scheme.group_size, scheme.precision) == ("auto", 4, 64, "int4")
    assert set(scheme.overrides[:-1]) == {
        Override(modules="model.layers.10.self_attn.[kqv]_proj", bits=8, group_size=64),
        Override(modules="model.layers.11.mlp.[gu]*_proj", bits=8, group_size=64),
        Override(modules="model.layers.3.mlp.down_proj", bits=4, group_size=32),
    }
    assert scheme.overrides[-1] == Override(modules="model.layers.*.mlp.down_proj", bits=8, group_size=128)


def test_of_two_equally_common_numbers_the_scheme_s_own_needs_no_word() -> None:
    """Half of the layers differ: only they are written."""
    chosen = {module_group.name: WeightArgs(4, 64) for module_group in UNITS}
    chosen |= {f"model.layers.{layer}.mlp.down_proj": WeightArgs(8, 128) for layer in range(6)}
    assert len(written(UNITS, chosen, NAMES).overrides) == 6


def test_eight_bits_everywhere_are_an_int8() -> None:
    """The precision word is that of the lowest bits used."""
    assert written(UNITS, {module_group.name: WeightArgs(8, 64) for module_group in UNITS}, NAMES).precision == "int8"


def test_a_large_model_loads_on_as_many_gpus_as_asked_for() -> None:
    """QwQ-32B on four GPUs: any choice of any unit can be shared, and its size is that of the forecast."""
    found = module_groups_of(QWQ_32B.shapes, "cuda", tensor_parallel=4, heads=heads_of(QWQ_32B))
    scheme = written(
        found, {module_group.name: module_group.choices[0] for module_group in found}, list(QWQ_32B.shapes)
    )
    assert uneven_share(QWQ_32B.shapes, scheme, 4, heads_of(QWQ_32B)) is None
    assert predicted_bytes(QWQ_32B, scheme) / 1e9 == pytest.approx(18.75, rel=0.01)
