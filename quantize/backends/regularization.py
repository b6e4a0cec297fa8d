"""Hessians of few tokens, made fit to be inverted: shrinkage, then damping.

A module's Hessian is the second moment of its inputs, estimated from T tokens for K inputs. Where T is not many times
K, chance gives the estimate directions that other texts do not have, and what GPTQ moves along them is wrong there.
Shrinkage towards a multiple of the identity is the usual remedy (Ledoit and Wolf, 2004, doi
10.1016/S0047-259X(03)00096-4); the best amount falls with K / T, so S K / T of the typical diagonal is added. Damping,
a hundredth of it, is for rounding errors only (arXiv 2210.17323, section 3.3).

The typical diagonal is its median. A first token's activation can be hundreds of times the others' in a few inputs
(arXiv 2402.17762): a share of a mean that they make is more than all there is of the other inputs, and GPTQ would round
to nearest.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Regularization:
    """What is added to a Hessian's diagonal: shrinkage once, and the least damping with which it factors.

    Both are shares of the typical diagonal; without shrinkage damping is one of the mean, as in other tools.
    """

    shrinkage: float
    damping: tuple[float, ...]


def lower_factors(hessian: Any, regularization: Regularization) -> Iterator[tuple[Any, float]]:
    """Give the lower Cholesky factors of a Hessian [K, K], each with its damping, least first; none that has none.

    Damping of the mean comes last: beside a massive input, rounding errors can be more than the others have.
    """
    import torch  # noqa: PLC0415

    plain = hessian.diagonal()
    mean = plain.mean()
    typical = plain.median().minimum(mean)  # the mean is less where most inputs are dead
    for whole in (typical, mean) if regularization.shrinkage else (mean,):
        for damp in regularization.damping:
            regular = hessian.clone()
            regular.diagonal().add_(regularization.shrinkage * typical + damp * whole)
            lower, failed = torch.linalg.cholesky_ex(regular)
            if not int(failed):
                yield lower, damp


def factor(hessian: Any, regularization: Regularization) -> tuple[Any, float] | None:
    """Factor the inverse of a Hessian [K, K]: gives its upper Cholesky factor, as GPTQ uses it, and the damping.

    None where no damping helps.
    """
    import torch  # noqa: PLC0415

    for lower, damp in lower_factors(hessian, regularization):
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not int(failed):
            return upper, damp
    return None
