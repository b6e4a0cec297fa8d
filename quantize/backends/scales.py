"""Scales of weight groups, searched for the error that GPTQ will be charged for.

GPTQ charges an input j of a layer (w - q)^2 / d_j^2, with d the diagonal of the upper Cholesky factor of the inverse
Hessian (arXiv 2210.17323, section 3.3). So a group's scale is the one with the least sum of that, over a grid of
scales; each candidate is first moved to the least squares of the integers it gives. At 4 bits both signs are tried: the
integers reach from -8 to 7, and the largest weight should meet the longer side. With zero points, a group's integers
reach from -zero to 2^bits - 1 - zero: those next to the one that meets both ends of the group are tried, too.
"""

from typing import Any

_GRID = 24
_SMALLEST, _LARGEST = 0.55, 1.1
_ZERO_OFFSETS = (-1, 0, 1)
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
            scale, cost = _least_squares(weights, charges, sign * share * reach, (-half, half - 1))
            better = cost < best_cost
            best_cost, best = torch.where(better, cost, best_cost), torch.where(better, scale, best)
    return best.squeeze(1)


def best_scales_and_zeros(weights: Any, charges: Any, bits: int) -> tuple[Any, Any]:
    """Choose a scale and a zero point, both [N], for each row of `weights` [N, G], as `best_scales` chooses scales.

    Scales are positive, zero points integers from 0 to 2^bits - 1. A row of zeros gets a scale of 1.
    """
    import torch  # noqa: PLC0415

    top = (1 << bits) - 1
    low = weights.amin(dim=1, keepdim=True).clamp(max=0.0)
    extent = weights.amax(dim=1, keepdim=True).clamp(min=0.0) - low
    step = torch.where(extent > _TINY, extent / top, 1.0)
    middle = (-low / step).round()
    best_cost = torch.full_like(step, float("inf"))
    best, best_zero = step.clone(), middle.clone()
    for offset in _ZERO_OFFSETS:
        zero = (middle + offset).clamp(0, top)
        for share in torch.linspace(_SMALLEST, _LARGEST, _GRID).tolist():
            scale, cost = _least_squares(weights, charges, share * step, (-zero, top - zero))
            better = (cost < best_cost) & (extent > _TINY)
            best_cost, best = torch.where(better, cost, best_cost), torch.where(better, scale, best)
            best_zero = torch.where(better, zero, best_zero)
    return best.squeeze(1), best_zero.squeeze(1)


def _nearest(weights: Any, scale: Any, ends: tuple[Any, Any]) -> Any:
    return (weights / scale).round().clamp(*ends)


def _least_squares(weights: Any, charges: Any, scale: Any, ends: tuple[Any, Any]) -> tuple[Any, Any]:
    """Move a scale to where the charged error of its own integers is least; one that fits nothing stays.

    Gives the scale and its error, both [N, 1]. `ends` are the least and the largest integer.
    """
    import torch  # noqa: PLC0415

    integers = _nearest(weights, scale, ends)
    fitted = (charges * integers * weights).sum(1, keepdim=True) / (charges * integers * integers).sum(1, keepdim=True)
    moved = torch.where(fitted.isfinite() & (fitted.abs() > _TINY), fitted, scale)
    return moved, (charges * (_nearest(weights, moved, ends) * moved - weights).square()).sum(dim=1, keepdim=True)
