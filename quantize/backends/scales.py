"""Scales of weight groups, searched for the error that GPTQ will be charged for.

GPTQ charges an input j of a layer (w - q)^2 / d_j^2, with d the diagonal of the upper Cholesky factor of the inverse
Hessian (arXiv 2210.17323, section 3.3). So a group's scale is the one with the least sum of that, over a grid of
scales; each candidate is first moved to the least squares of the integers it gives. At 4 bits both signs are tried: the
integers reach from -8 to 7, and the largest weight should meet the longer side.
"""

from typing import Any

_GRID = 24
_SMALLEST, _LARGEST = 0.55, 1.1
_TINY = 1e-12


def best_scales(weights: Any, charges: Any, bits: int) -> Any:
    """Choose a scale [N] for each row of `weights` [N, G], given what an error costs at each input, `charges` [G]."""
    import torch  # noqa: PLC0415

    half = 1 << (bits - 1)
    reach = weights.abs().amax(dim=1, keepdim=True).clamp(min=_TINY) / half
    best_cost = torch.full_like(reach, float("inf"))
    best = reach.clone()
    for share in torch.linspace(_SMALLEST, _LARGEST, _GRID).tolist():
        for sign in (1.0, -1.0) if bits == 4 else (1.0,):
            scale = _least_squares(weights, charges, sign * share * reach, half)
            cost = (charges * (_nearest(weights, scale, half) * scale - weights).square()).sum(dim=1, keepdim=True)
            better = cost < best_cost
            best_cost, best = torch.where(better, cost, best_cost), torch.where(better, scale, best)
    return best.squeeze(1)


def _nearest(weights: Any, scale: Any, half: int) -> Any:
    return (weights / scale).round().clamp(-half, half - 1)


def _least_squares(weights: Any, charges: Any, scale: Any, half: int) -> Any:
    """Move a scale to where the charged error of its own integers is least; one that fits nothing stays."""
    import torch  # noqa: PLC0415

    integers = _nearest(weights, scale, half)
    fitted = (charges * integers * weights).sum(1, keepdim=True) / (charges * integers * integers).sum(1, keepdim=True)
    return torch.where(fitted.isfinite() & (fitted.abs() > _TINY), fitted, scale)
