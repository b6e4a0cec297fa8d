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

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Regularization:
    """What is added to a Hessian's diagonal: shrinkage once, and the least damping with which it factors.

    Both are shares of the typical diagonal; without shrinkage damping is one of the mean, as in other tools.
    """

    shrinkage: float
    damping: tuple[float, ...]

    def whole(self, diagonal: Any) -> Any:
        """What shares are of; never more than the mean, which a module whose inputs are mostly dead has."""
        mean = diagonal.mean()
        return diagonal.median().minimum(mean) if self.shrinkage else mean


def factor(hessian: Any, regularization: Regularization) -> tuple[Any, float] | None:
    """Factor the inverse of a Hessian [K, K] with shrinkage and the least damping that works; None where none does.

    Gives the upper Cholesky factor of the inverse, as GPTQ uses it, and the damping. Leaves `hessian` as it was.
    """
    import torch  # noqa: PLC0415

    diagonal = hessian.diagonal()
    plain, whole = diagonal.clone(), regularization.whole(diagonal)
    for damp in regularization.damping:
        diagonal.add_((regularization.shrinkage + damp) * whole)
        lower, failed = torch.linalg.cholesky_ex(hessian)
        diagonal.copy_(plain)
        if int(failed):
            continue
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not int(failed):
            return upper, damp
    return None
