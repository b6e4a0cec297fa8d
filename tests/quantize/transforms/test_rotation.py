"""Rotations are orthogonal at any size, and undo each other between a layer that writes and one that reads."""

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs torch: install the quantize extra")

from quantize.transforms.rotation import head_columns, head_rows, orthogonal  # noqa: E402


@pytest.mark.parametrize("size", [1, 3, 64, 96, 576])
def test_a_rotation_keeps_lengths(size: int) -> None:
    """Powers of two, odd sizes and products of both."""
    rotation = orthogonal(size, torch.Generator().manual_seed(3))
    assert torch.allclose(rotation.T @ rotation, torch.eye(size, dtype=torch.float64), atol=1e-12)


def test_a_rotation_spreads_an_outlier() -> None:
    """Hadamard's part leaves at most a share of it in any channel."""
    outlier = torch.zeros(576, dtype=torch.float64)
    outlier[7] = 1.0
    assert float((outlier @ orthogonal(576, torch.Generator().manual_seed(3))).abs().max()) <= 64**-0.5


def test_equal_seeds_give_equal_rotations() -> None:
    """A variant is the same on every run; another seed gives another."""
    one, same, other = (orthogonal(64, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_heads_that_share_keys_and_values_read_the_same_rotation() -> None:
    """Two KV heads of eight channels, three query heads for each: o(v) stays as it was."""
    generator = torch.Generator().manual_seed(4)
    rotations = torch.stack([orthogonal(8, generator) for _ in range(2)])
    values, outputs = (torch.randn(shape, dtype=torch.float64, generator=generator) for shape in ((16, 5), (7, 48)))

    def read(values: Any, outputs: Any) -> Any:
        return outputs @ values.reshape(2, 1, 8, 5).expand(2, 3, 8, 5).reshape(48, 5)

    assert torch.allclose(
        read(head_rows(values, rotations), head_columns(outputs, rotations, 6)), read(values, outputs)
    )
    assert head_rows(values[:, 0], rotations).shape == (16,)
