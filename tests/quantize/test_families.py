"""Every family that people fine-tune, as a tiny model: each is quantized with one scheme; the table is kept true."""

from dataclasses import replace
from itertools import cycle
from pathlib import Path

import pytest

from quantize.base import BaseModel, read_base
from quantize.errors import SolveError
from quantize.module_tree import PLAIN_FAMILIES
from quantize.planning.request import Request
from quantize.schemes.scheme import preset
from quantize.schemes.settings import SETTINGS
from tests.quantize.families import FAMILIES
from tests.quantize.family_runs import (
    COLUMNS,
    TABLE,
    base_of,
    read_table,
    recipe_of,
    run_case,
    solve,
    write_families,
)

pytest.importorskip("gptqmodel", reason="needs gptqmodel: install the quantize extra")

pytestmark = [pytest.mark.real_model, pytest.mark.timeout(300)]

# A search measures the sensitivity of all layers in a process of its own: half a minute a family.
CASES = list(zip(FAMILIES, cycle(column for column in COLUMNS if column != "auto"), strict=False))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, BaseModel]:
    """The tiny models of all families."""
    folder = tmp_path_factory.mktemp("families")
    return {name: base_of(directory) for name, directory in write_families(folder)}


def test_the_table_has_every_family_and_scheme() -> None:
    """At least 20 families, six with experts; `python -m tests.quantize.family_runs` writes the table anew."""
    table = read_table(TABLE.read_text())
    assert list(table) == list(FAMILIES)
    assert all(list(row) == list(COLUMNS) for row in table.values())
    assert len({family.model_type for family in FAMILIES.values()}) >= 20
    assert len({family.model_type for family in FAMILIES.values() if family.experts}) >= 6


@pytest.mark.parametrize("name,column", CASES)
def test_a_family(bases: dict[str, BaseModel], tmp_path: Path, name: str, column: str) -> None:
    """It is quantized and reads back close to its parent, or is refused before any work, as the table says."""
    outcome = run_case(bases[name], column, tmp_path)
    assert outcome.result == read_table(TABLE.read_text())[name][column]


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.model_type in PLAIN_FAMILIES])
def test_headers_of_plain_families_tell_what_the_module_tree_tells(bases: dict[str, BaseModel], name: str) -> None:
    """Their trees need not be read: the solver's names and shapes are those of the files."""
    from quantize.backends.module_tree_child import read_tree  # noqa: PLC0415

    tree = read_tree(bases[name].directory, bases[name].directory / "scratch")
    assert tree.shapes == read_base(bases[name].directory, digested=False).shapes
    assert all(layer.solver_name == layer.stored_name for layer in tree.layers)


@pytest.mark.parametrize(
    "name,kept",
    [
        ("deepseek_v3", ("q_a_proj", "kv_a_proj_with_mqa", "mlp.gate")),
        ("qwen3_next", ("linear_attn.in_proj_qkvz", "linear_attn.out_proj", "mlp.gate", "shared_expert_gate")),
        ("qwen3_5_text", ("linear_attn.in_proj_qkv", "linear_attn.in_proj_a")),
        ("mixtral", ("block_sparse_moe.gate",)),
        ("gpt_oss", ("mlp.router",)),
        ("glm4_moe (NextN)", ("layers.2.eh_proj", "layers.2.self_attn.q_proj", "layers.2.mlp.experts.0.up_proj")),
        ("gemma3", ("vision_tower.encoder.layers.0.self_attn.q_proj",)),
        ("qwen2_5_vl", ("visual.blocks.0.attn.qkv",)),
    ],
)
def test_what_is_never_quantized(bases: dict[str, BaseModel], name: str, kept: tuple[str, ...]) -> None:
    """Routers, replicated projections, linear attention, further-token layers and vision towers are not counted."""
    base = bases[name]
    for part in kept:
        assert any(part in tensor for tensor in base.tensors), part
        assert not any(module.endswith(part) or f".{part}." in f"{module}." for module in base.shapes), part


def test_experts_that_no_token_reaches(bases: dict[str, BaseModel], tmp_path: Path) -> None:
    """They are rounded to nearest and reported with their count, or are an error that names the first."""
    base = bases["qwen3_moe"]
    scheme = preset("w4a16-g128")
    request = Request(base=base.directory, scheme=scheme, engine="cuda", out=tmp_path, settings=SETTINGS["best"])
    recipe = replace(recipe_of(request, base), datasets=())
    assert recipe.settings.gptaq == 0
    few = [{"ids": [7] * 12, "where": "sample 0"}]
    events = solve(recipe, few, tmp_path / "rtn")
    unseen = [event for event in events if event["undersampled"]]
    assert unseen
    assert all(event["tokens"] == 0 and event["loss"] is None for event in unseen)
    assert all(".experts." in event["module"] for event in unseen)
    with pytest.raises(SolveError, match=r"\.experts\.\d+\.\w+: 0 of 12 calibration tokens reached this expert"):
        solve(recipe, few, tmp_path / "fail", expert_fallback="fail")
