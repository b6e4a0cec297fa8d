"""Scales for groups of weights: never worse than the plain one, where the error is what GPTQ is charged for."""

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs torch: install the quantize extra")

from quantize.backends.gptaq import moved  # noqa: E402
from quantize.backends.regularization import Regularization  # noqa: E402
from quantize.backends.scales import best_scales, best_scales_and_zeros  # noqa: E402

pytestmark = pytest.mark.real_model
DAMPED = Regularization(0.0, (0.01,))


def cost(weights: Any, charges: Any, scale: Any, bits: int) -> Any:
    """What rounding with these scales is charged, row by row."""
    half = 1 << (bits - 1)
    step = scale.unsqueeze(1)
    rounded = (weights / step).round().clamp(-half, half - 1) * step
    return (charges * (rounded - weights).square()).sum(dim=1)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("seed", range(4))
def test_no_row_pays_more_than_with_the_plain_scale(bits: int, seed: int) -> None:
    """The plain scale lets the largest weight meet the largest integer."""
    torch.manual_seed(seed)
    weights = torch.randn(32, 64) * torch.rand(32, 1)
    charges = torch.rand(64).pow(4) + 1e-3
    plain = weights.abs().amax(dim=1) / ((1 << (bits - 1)) - 0.5)
    found = best_scales(weights, charges, bits)
    assert (cost(weights, charges, found, bits) <= cost(weights, charges, plain, bits) * 1.02).all()
    assert cost(weights, charges, found, bits).sum() < 0.95 * cost(weights, charges, plain, bits).sum()


def test_the_largest_weight_meets_the_longer_side() -> None:
    """At four bits -8 is there and 8 is not: a row with one large positive weight gets a negative scale."""
    weights = torch.tensor([[8.0, 1.0, -2.0, 3.0], [-8.0, 1.0, -2.0, 3.0]])
    found = best_scales(weights, torch.ones(4), 4)
    assert found.tolist() == pytest.approx([-1.0, 1.0])
    assert (best_scales(weights, torch.ones(4), 8) > 0).all()


def test_rows_of_zeros_have_a_usable_scale() -> None:
    """Padding rows must not divide by zero."""
    found = best_scales(torch.zeros(2, 8), torch.ones(8), 4)
    assert found.isfinite().all()
    assert (found != 0).all()


def cost_with_zeros(weights: Any, charges: Any, scale: Any, zero: Any, bits: int) -> Any:
    """What rounding with these scales and zero points is charged, row by row."""
    step, zero = scale.unsqueeze(1), zero.unsqueeze(1)
    rounded = ((weights / step).round() + zero).clamp(0, (1 << bits) - 1) - zero
    return (charges * (rounded * step - weights).square()).sum(dim=1)


@pytest.mark.parametrize("shift", [0.0, 0.7, -3.0])
@pytest.mark.parametrize("seed", range(3))
def test_zero_points_cost_less_than_none(seed: int, shift: float) -> None:
    """The less, the further a group is from the middle; also than the whole range without a search."""
    torch.manual_seed(seed)
    weights = (torch.randn(32, 64) + shift) * torch.rand(32, 1)
    charges = torch.rand(64).pow(4) + 1e-3
    scale, zero = best_scales_and_zeros(weights, charges, 4)
    assert (scale > 0).all()
    assert torch.equal(zero, zero.round())
    assert 0 <= zero.min() <= zero.max() <= 15
    found = cost_with_zeros(weights, charges, scale, zero, 4)
    low, high = weights.amin(1).clamp(max=0), weights.amax(1).clamp(min=0)
    plain = (high - low) / 15
    assert found.sum() < 0.95 * cost_with_zeros(weights, charges, plain, (-low / plain).round(), 4).sum()
    symmetric = cost(weights, charges, best_scales(weights, charges, 4), 4)
    assert found.sum() < (0.97 if shift == 0 else 0.9) * symmetric.sum()


def test_rows_of_zeros_are_exact_with_zero_points() -> None:
    """Padding rows have a scale that fp16 holds, and integers that give zeros."""
    scale, zero = best_scales_and_zeros(torch.zeros(2, 8), torch.ones(8), 4)
    assert scale.tolist() == [1.0, 1.0]
    assert zero.tolist() == [0.0, 0.0]


def test_a_weight_that_is_charged_more_is_met_better() -> None:
    """Charges decide between inputs."""
    torch.manual_seed(0)
    weights = torch.randn(64, 32)
    dear = torch.ones(32)
    dear[5] = 1000.0

    def error(charges: Any) -> float:
        step = best_scales(weights, charges, 4).unsqueeze(1)
        rounded = (weights / step).round().clamp(-8, 7) * step
        return float((rounded - weights)[:, 5].square().mean())

    assert error(dear) < 0.5 * error(torch.ones(32))


def test_weights_make_up_for_inputs_that_have_drifted() -> None:
    """With the whole share, moved weights on drifted inputs give nearly what the weights gave on the true ones."""
    torch.manual_seed(1)
    true = torch.randn(16, 4000)
    drifted = true + 0.3 * torch.randn(16, 16) @ true / 4
    weights = torch.randn(8, 16)
    hessian, drift = drifted @ drifted.T, (true - drifted) @ drifted.T
    wanted = weights @ true
    before = (weights @ drifted - wanted).square().mean()
    halfway = (moved(weights, hessian, 0.5 * weights @ drift, DAMPED) @ drifted - wanted).square().mean()
    after = (moved(weights, hessian, weights @ drift, DAMPED) @ drifted - wanted).square().mean()
    assert after < 0.05 * before
    assert after < halfway < before


def test_no_drift_moves_nothing() -> None:
    """In the first layer inputs are the true ones."""
    weights = torch.randn(4, 8)
    assert torch.equal(moved(weights, torch.eye(8), torch.zeros(4, 8), DAMPED), weights)
