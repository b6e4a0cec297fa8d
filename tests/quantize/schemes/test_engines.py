"""Engines: which schemes they load, with what, and what a search may choose for them."""

from pathlib import Path

import pytest

from config.manifest import Engine, Override
from quantize.base import BaseModel
from quantize.errors import RecipeError
from quantize.schemes.engines import choices, expert_refusals, has_amx, kernels, refusals, require_engine
from quantize.schemes.module_config import WeightArgs
from quantize.schemes.scheme import PRESETS, preset


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
        ("fp8-dynamic", True),
        ("fp8-block", True),
        ("w4a16-asym", True),
        ("w4a16-asym-g64", True),
        ("nvfp4a16", False),
        ("mxfp4", False),
    ],
)
def test_cpu_refuses_8_bit_gptq_and_fp4(name: str, loads: bool) -> None:
    """8-bit GPTQ and 4-bit floats have no CPU kernel; the reason says what to do."""
    assert ("cpu" not in refusals(preset(name))) == loads
    if not loads:
        with pytest.raises(RecipeError, match=r"w8a8|serve it on a GPU"):
            require_engine(preset(name), "cpu")


def test_block_fp8_needs_amx() -> None:
    """Of a known CPU, its instruction sets count."""
    assert "needs a CPU with amx_tile" in refusals(preset("fp8-block"), frozenset({"avx2"}))["cpu"]
    assert refusals(preset("fp8-block"), frozenset({"amx_tile"})) == {}


def test_zero_points_need_avx512() -> None:
    """Of a known CPU, its instruction sets count; symmetric weights are the way out."""
    assert "use symmetric weights" in refusals(preset("w4a16-asym"), frozenset({"avx2"}))["cpu"]
    assert refusals(preset("w4a16-asym"), frozenset({"avx512f"})) == {}


def test_cpu_refuses_single_modules_of_8_bits_too() -> None:
    """An exception that has no CPU kernel is named."""
    mixed = preset("w4a16-g64").model_copy(update={"overrides": (Override(modules="*.down_proj", bits=8),)})
    assert "cuda" not in refusals(mixed)
    assert "GPTQ (*.down_proj) of 4 bits, not of 8" in refusals(mixed)["cpu"]


def test_what_loads_nowhere_is_refused_by_all() -> None:
    """A scheme outside the format has the same reason everywhere."""
    assert set(refusals(preset("w4a16-g64").with_weights(num_bits=3))) == {"cpu", "cuda"}


@pytest.mark.parametrize(
    "name,engine,told",
    [
        ("w4a16-g128", "cuda", "Machete on Hopper"),
        ("w4a16-g32", "cuda", "Marlin"),
        ("w4a16-g32", "cpu", "CPUWNA16"),
        ("w8a8", "cpu", "CPUInt8ScaledMM"),
        ("w8a8", "cuda", "CUTLASS"),
        ("fp8-dynamic", "cuda", "CUTLASS FP8 from Ada on, else Marlin"),
        ("fp8-dynamic", "cpu", "torch._scaled_mm"),
        ("nvfp4a16", "cuda", "FP4 of Blackwell"),
    ],
)
def test_kernels(name: str, engine: Engine, told: str) -> None:
    """Whoever reads a plan learns what will run."""
    assert kernels(preset(name), engine).startswith(told)


@pytest.mark.parametrize(
    "engine,columns,expected",
    [
        ("cpu", 576, [(4, 64), (4, 32)]),
        ("cpu", 1536, [(4, 128), (4, 64), (4, 32)]),
        ("cuda", 576, [(4, 64), (4, 32), (8, 64), (8, 32)]),
        ("cuda", 40, []),
    ],
)
def test_choices_fit_module_and_engine(engine: Engine, columns: int, expected: list[tuple[int, int]]) -> None:
    """A search chooses among what loads, smallest first."""
    assert choices(engine, (64, columns)) == tuple(WeightArgs(*weight_args) for weight_args in expected)


EXPERT = "model.layers.0.mlp.experts.3.up_proj"


def base_with(family: str, *modules: str) -> BaseModel:
    """A base with 128 x 128 matrices of these names."""
    shapes = dict.fromkeys(modules, (128, 128))
    return BaseModel(Path("/models/base"), "base", "bf16", "", 0, {"model_type": family}, shapes)


@pytest.mark.parametrize(
    "family,modules,overrides,amx,refused",
    [
        ("qwen3", ("model.layers.0.mlp.up_proj",), (), False, set()),
        ("qwen3_moe", (EXPERT,), (), False, {"cpu"}),
        ("qwen3_moe", (EXPERT,), (), True, set()),
        ("qwen3_moe", (EXPERT,), (Override(modules="*.experts.*"),), False, set()),
        ("gpt_oss", (EXPERT,), (), True, {"cpu", "cuda"}),
        ("gpt_oss", (EXPERT,), (Override(modules="*.experts.*"),), True, set()),
    ],
)
def test_experts_need_a_kernel(
    family: str, modules: tuple[str, ...], overrides: tuple[Override, ...], amx: bool, refused: set[str]
) -> None:
    """On a CPU without AMX there is none, and for some families vLLM loads other formats; kept experts need none."""
    scheme = preset("w4a16-g128").model_copy(update={"overrides": overrides})
    found = expert_refusals(scheme, base_with(family, *modules), amx=amx)
    assert set(found) == refused
    assert all("--override '*.experts.*=keep'" in reason for reason in found.values())


@pytest.mark.parametrize("flags,expected", [("fpu amx_bf16 amx_tile avx", True), ("fpu avx512_bf16", False)])
def test_amx_is_read_from_the_flags(flags: str, expected: bool) -> None:
    """As Linux lists them for each core."""
    assert has_amx(f"processor : 0\nflags\t\t: {flags}\n") is expected
