"""Packing of solved modules: what is packed is what `quantize.variants.weights` reads."""

from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs torch: install the quantize extra")

from quantize.backends.layer_checkpoint import LayerCheckpoint, ModuleSolution, dense_weight  # noqa: E402
from quantize.backends.packing import pack, packed_tensors  # noqa: E402
from quantize.variants.weights import gptq_dense, gptq_integers, gptq_zeros  # noqa: E402

OUTPUTS, INPUTS = 32, 64


@pytest.mark.parametrize("bits,group_size", [(4, 32), (4, 64), (8, 32), (8, 64)])
def test_integers_come_back(bits: int, group_size: int) -> None:
    """Symmetric groups: the zero point is the middle of the range."""
    integers = torch.randint(0, 1 << bits, (OUTPUTS, INPUTS), generator=torch.Generator().manual_seed(bits))
    groups = INPUTS // group_size
    scale, zero = torch.full((OUTPUTS, groups), 0.5), torch.full((OUTPUTS, groups), float(1 << (bits - 1)))
    g_idx = torch.arange(INPUTS) // group_size
    packed = pack(integers.to(torch.uint8), scale, zero, g_idx, bits)
    assert packed["qweight"].shape == (INPUTS * bits // 32, OUTPUTS)
    assert packed["qzeros"].shape == (groups, OUTPUTS * bits // 32)
    assert torch.equal(gptq_integers(packed, bits), integers.t().int() - (1 << (bits - 1)))
    assert torch.equal(gptq_dense(packed, bits), dense_weight(integers, scale, zero, g_idx))


def test_every_zero_point_comes_back() -> None:
    """Of asymmetric groups, 0 and 15 are among them: what is stored is one less."""
    zero = (torch.arange(OUTPUTS * 2) % 16).reshape(OUTPUTS, 2).float()
    integers = torch.randint(0, 16, (OUTPUTS, INPUTS), generator=torch.Generator().manual_seed(4))
    scale, g_idx = torch.rand(OUTPUTS, 2).half().float(), torch.arange(INPUTS) // 32
    packed = pack(integers.to(torch.uint8), scale, zero, g_idx, 4)
    assert torch.equal(gptq_zeros(packed, 4), zero.t().int())
    assert torch.equal(gptq_dense(packed, 4), dense_weight(integers, scale, zero, g_idx))


def test_modules_are_packed_when_they_are_asked_for(tmp_path: Path) -> None:
    """Once for all of their tensors, in the order in which they are read."""
    checkpoint = LayerCheckpoint(tmp_path, torch.float32)
    scale, zero, g_idx = torch.full((OUTPUTS, 1), 0.25), torch.full((OUTPUTS, 1), 8.0), torch.zeros(INPUTS)
    for name in ("a", "b"):
        dense = dense_weight(torch.full((OUTPUTS, INPUTS), 9), scale, zero, g_idx)
        checkpoint.write(name, ModuleSolution(dense, scale, zero, g_idx, 0.1, 0.01, 5))
    read: list[str] = []
    tensors = packed_tensors(tmp_path, {"b": 4, "a": 4}, read.append)
    assert read == []
    parts = ("qweight", "qzeros", "scales", "g_idx")
    assert sorted(tensors) == sorted(f"{name}.{part}" for name in "ab" for part in parts)
    layers = [{part: tensors[f"{name}.{part}"][...] for part in parts} for name in "ba"]
    assert read == ["b", "a"]
    assert all(torch.equal(gptq_dense(layer, 4), torch.full((OUTPUTS, INPUTS), 0.25)) for layer in layers)
