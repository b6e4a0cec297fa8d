"""Scales of weight groups, searched for the error that GPTQ will be charged for.

GPTQ charges an input j of a layer (w - q)^2 / d_j^2, with d the diagonal of the upper Cholesky factor of the inverse
Hessian (arXiv 2210.17323, section 3.3). So a group's scale is the one with the least sum of that, over a grid of
scales; each candidate is moved to the least squares of the integers it gives. At 4 bits both signs are tried: the
integers reach from -8 to 7, and the largest weight should meet the longer side. With zero points, a group's integers
reach from -zero to 2^bits - 1 - zero: those next to the one that meets both ends of the group are tried, too.

With c the charges, the integers q of the weights w are charged sum(c w^2) - sum(c q w)^2 / sum(c q^2) at their own
least squares. Only the second term differs between candidates: they need no array of errors, and no memory of their
own.
"""

from collections.abc import Sequence
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
    # A negative scale turns the integers round.
    ranges = [(-half, half - 1), (1 - half, half)] if bits == 4 else [(-half, half - 1)]
    scale, chosen = _search(weights, charges, reach, ranges)
    return torch.where(chosen == 1, -scale, scale).squeeze(1)


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
    zeros = [(middle + offset).clamp(0, top) for offset in _ZERO_OFFSETS]
    scale, chosen = _search(weights, charges, step, [(-zero, top - zero) for zero in zeros])
    return scale.squeeze(1), torch.cat(zeros, dim=1).gather(1, chosen).squeeze(1)


def _search(weights: Any, charges: Any, step: Any, ranges: Sequence[tuple[Any, Any]]) -> tuple[Any, Any]:
    """Search around `step` [N, 1], with each range of integers; gives a scale and the number of its range, both [N, 1].

    A row that no candidate explains, of zeros, keeps its step and the first range.
    """
    import torch  # noqa: PLC0415

    weights = weights.contiguous()  # a group is a slice of a matrix
    charged = weights * charges
    scaled, integers = torch.empty_like(charged), torch.empty_like(charged)
    most, scale, chosen = torch.zeros_like(step), step, torch.zeros_like(step, dtype=torch.long)
    for share in torch.linspace(_SMALLEST, _LARGEST, _GRID).tolist():
        torch.mul(weights, 1 / (share * step), out=scaled).round_()
        for number, (least, largest) in enumerate(ranges):
            torch.clamp(scaled, least, largest, out=integers)
            explained, fitted = _least_squares(integers, charged, charges)
            better = explained > most
            most, scale = torch.where(better, explained, most), torch.where(better, fitted, scale)
            chosen = torch.where(better, number, chosen)
    return scale, chosen


def _least_squares(integers: Any, charged: Any, charges: Any) -> tuple[Any, Any]:
    """Fit integers [N, G] to their weights: the part of their charge that this explains, and the scale, both [N, 1].

    `charged` are the weights times their charges. Overwrites `integers`.
    """
    import torch  # noqa: PLC0415

    products = torch.bmm(integers.unsqueeze(1), charged.unsqueeze(2)).squeeze(2)
    squares = (integers.square_() @ charges).unsqueeze(1)
    fitted = products / squares
    return products * fitted, fitted
