"""Names of layers: in the solver, on disk and in the variant."""

import pytest

from quantize.modules import LinearLayer, ModuleTree, direct_tree, is_expert, is_kept, stored_name

LAYER = "model.layers.3."
MATRIX = f"{LAYER}mlp.gate_up_proj"
FUSED = ModuleTree(
    (
        LinearLayer(f"{LAYER}mlp.up_proj", MATRIX, f"{MATRIX}.weight", 64, 32, part=1),
        LinearLayer(f"{LAYER}mlp.gate_proj", MATRIX, f"{MATRIX}.weight", 64, 32, part=0),
    )
)


@pytest.mark.parametrize(
    "solver_name,tensor,expert,expected",
    [
        (f"{LAYER}mlp.up_proj", f"{LAYER}mlp.up_proj.weight", None, f"{LAYER}mlp.up_proj"),
        (f"{LAYER}mlp.up_proj", f"{LAYER}mlp.gate_up_proj.weight", None, f"{LAYER}mlp.gate_up_proj"),
        (
            f"{LAYER}mlp.experts.7.up_proj",
            f"{LAYER}block_sparse_moe.experts.7.w3.weight",
            None,
            f"{LAYER}block_sparse_moe.experts.7.w3",
        ),
        (f"{LAYER}mlp.experts.7.up_proj", f"{LAYER}mlp.experts.gate_up_proj", 7, f"{LAYER}mlp.experts.7.up_proj"),
        (f"{LAYER}mlp.experts.7.down_proj", f"{LAYER}mlp.experts.down_proj", 7, f"{LAYER}mlp.experts.7.down_proj"),
    ],
)
def test_stored_names(solver_name: str, tensor: str, expert: int | None, expected: str) -> None:
    """The base's own name, and one for each expert where the base has one tensor for all."""
    assert stored_name(solver_name, tensor, expert) == expected


@pytest.mark.parametrize(
    "name,kept,expert",
    [
        (f"{LAYER}self_attn.q_proj", False, False),
        (f"{LAYER}self_attn.q_a_proj", True, False),
        (f"{LAYER}self_attn.kv_a_proj_with_mqa", True, False),
        (f"{LAYER}self_attn.kv_b_proj", False, False),
        (f"{LAYER}linear_attn.out_proj", True, False),
        (f"{LAYER}mlp.experts.12.gate_proj", False, True),
        (f"{LAYER}mlp.shared_experts.gate_proj", False, False),
        (f"{LAYER}mlp.shared_expert.down_proj", False, False),
        ("mtp.layers.0.mlp.up_proj", True, False),
        ("model.mtp.layers.0.mlp.up_proj", True, False),
    ],
)
def test_kinds_of_layers(name: str, kept: bool, expert: bool) -> None:
    """Some are never quantized; experts are those that a router chooses."""
    assert (is_kept(name), is_expert(name)) == (kept, expert)


@pytest.mark.parametrize("family,expected", [("phi3", MATRIX), ("glm4", f"{LAYER}mlp.up_proj")])
def test_parts_of_a_matrix_have_the_name_that_vllm_looks_up(family: str, expected: str) -> None:
    """Phi-3's class asks for the matrix, GLM-4's for its parts."""
    assert stored_name(f"{LAYER}mlp.up_proj", f"{MATRIX}.weight", None, 1, family) == expected


def test_layers_that_share_a_matrix() -> None:
    """They are one module, stacked in the order of their parts."""
    assert FUSED.shapes == {MATRIX: (128, 32)}
    (members,) = FUSED.members.values()
    assert [layer.solver_name.rpartition(".")[2] for layer in members] == ["gate_proj", "up_proj"]
    assert FUSED.stored_in == {f"{MATRIX}.weight": (MATRIX,)}


def test_a_tree_survives_a_job_file() -> None:
    """What a child process reads is what was written."""
    tree = ModuleTree(FUSED.layers, ("kept",), "Phi3QModel")
    assert ModuleTree.from_json(tree.as_json()) == tree
    assert direct_tree({"a.b": (4, 8)}).shapes == {"a.b": (4, 8)}
