"""Solved modules on disk come back bit for bit, and Hessians factor with the least damping that works."""

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs torch: install the quantize extra")

from quantize.backends.layer_checkpoint import LayerCheckpoint, ModuleSolution, dense_weight  # noqa: E402
from quantize.backends.regularization import Regularization, factor  # noqa: E402

pytestmark = pytest.mark.real_model


def solution(bits: int, dtype: Any, *, exact: bool = True) -> ModuleSolution:
    """A module of 6 outputs and 64 inputs in two groups, as a solver leaves it."""
    torch.manual_seed(bits)
    scale, zero = torch.rand(6, 2) / 7 + 0.01, torch.full((6, 2), float(1 << (bits - 1)))
    g_idx = torch.arange(64, dtype=torch.int32) // 32
    dense = dense_weight(torch.randint(0, 1 << bits, (6, 64), dtype=torch.uint8), scale, zero, g_idx)
    if not exact:
        dense = dense + 0.003
    return ModuleSolution(dense.to(dtype), scale, zero, g_idx, 0.125, 0.02, 4711)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exact", [True, False])
def test_a_solution_comes_back_bit_for_bit(tmp_path: Path, bits: int, dtype: Any, exact: bool) -> None:
    """Integers and scales give the dense weight back; where they can't, the weight itself is kept."""
    kept = LayerCheckpoint(tmp_path, dtype)
    written = solution(bits, dtype, exact=exact)
    kept.write("model.layers.0.mlp.up_proj", written)
    read = kept.read("model.layers.0.mlp.up_proj")
    for part in ("dense", "scale", "zero", "g_idx"):
        assert torch.equal(getattr(read, part), getattr(written, part)), part
    assert (read.loss, read.damp, read.tokens) == (0.125, 0.02, 4711)
    assert [path.name for path in tmp_path.iterdir()] == ["model.layers.0.mlp.up_proj.safetensors"]


def test_a_layer_counts_once_it_is_whole(tmp_path: Path) -> None:
    """Modules of a layer that was interrupted are not used."""
    kept = LayerCheckpoint(tmp_path, torch.float32)
    kept.write("model.layers.0.mlp.up_proj", solution(4, torch.float32))
    assert kept.completed_layers() == frozenset()
    kept.complete(0, ["model.layers.0.mlp.up_proj"])
    assert kept.completed_layers() == {0}


def hessian(rank: int, floor: float) -> Any:
    """A Hessian of 32 inputs that saw `rank` directions, and its diagonal lowered by `floor` times its mean."""
    torch.manual_seed(rank)
    seen = torch.randn(32, rank)
    full = seen @ seen.T
    return full - torch.eye(32) * full.diagonal().mean() * floor


@pytest.mark.parametrize("floor,damp", [(0.0, 0.01), (0.012, 0.02), (0.04, 0.05), (0.09, 0.1)])
def test_the_least_damping_that_works_is_taken(floor: float, damp: float) -> None:
    """Each rung of the ladder is tried in order, and the Hessian itself is left as it was."""
    given = hessian(rank=8, floor=floor)
    before = given.clone()
    found = factor(given, Regularization(0.0, (0.01, 0.02, 0.05, 0.1)))
    assert found is not None
    upper, used = found
    assert used == damp
    assert torch.equal(given, before)
    damped = given + torch.eye(32) * damp * given.diagonal().mean()
    assert torch.allclose(upper.T @ upper @ damped, torch.eye(32), atol=2e-2)


@pytest.mark.parametrize("broken", [hessian(rank=8, floor=0.5), torch.full((4, 4), float("nan"))])
def test_a_hessian_that_never_factors_is_said_so(broken: Any) -> None:
    """Indefinite beyond the ladder, or no numbers at all: None, never a guess."""
    assert factor(broken, Regularization(0.0, (0.01, 0.1))) is None
