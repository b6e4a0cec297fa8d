"""Weights that make up for what earlier layers' rounding did, before they are rounded themselves.

GPTQ keeps W X for the inputs X that the quantized layers before give; what should be kept is W X0, with X0 the
unquantized model's inputs. The weights closest to that are W + W C (X X')^-1 with C = (X0 - X) X' (GPTAQ, arXiv
2504.02692, equation 9). The output of some layers is added to the residual stream, which is H where the unquantized
model has H0: the weights closest to W X0 + H0 - H are moved by (H0 - H) X' (X X')^-1 more (the aim is that of LoaQ,
arXiv 2509.06297). GPTQModel gathers X X' and C; its own solver for them knows no order inside groups, so the weights
are moved first and then solved as any others.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from quantize.backends.regularization import Regularization
from quantize.backends.residual_stream import ResidualStreams

# Gives the regularization of a module with so many inputs.
Regularizations = Callable[[int], Regularization]


@dataclass(frozen=True, slots=True)
class Correction:
    """How much is made up for: shares of the error of a layer's inputs, and of that of the residual stream."""

    inputs: float
    residual: float


def moved(weights: Any, hessian: Any, wanted: Any, regularization: Regularization) -> Any:
    """Move `weights` [N, K] so that outputs change as wanted; `wanted` [N, K] are the sums of changes times inputs.

    It is a guess from few tokens, as the Hessian is: directions that they hardly have are left alone.
    """
    import torch  # noqa: PLC0415

    damped = hessian.clone()
    share = regularization.shrinkage + regularization.damping[0]
    damped.diagonal().add_(share * regularization.whole(hessian.diagonal()))
    return weights + torch.cholesky_solve(wanted.T, torch.linalg.cholesky(damped)).T


def corrected(
    solver: Any, gatherer: Any, correction: Correction, streams: ResidualStreams, regularization: Regularizations
) -> type:
    """Derive from GPTQModel's `GPTAQ`, which gathers both inputs, a class that moves weights and solves as `GPTQ`."""

    class Corrected(gatherer):  # type: ignore[misc]
        dXXT: Any  # noqa: N815 - the library's name for C
        _lost: Any = None

        def add_batch(self, inp: Any, out: Any, batch_index: int | None = None) -> None:
            super().add_batch(inp, out, batch_index=batch_index)
            inputs = inp.reshape(-1, inp.shape[-1]).float()
            lost = streams.lost(self._named_module.full_name, out)
            if lost is not None:
                product = lost.T @ inputs
                self._lost = product if self._lost is None else self._lost.add_(product)

        def quantize(self, blocksize: int = 128) -> Any:
            weight = self.module.weight.data.float()
            wanted = correction.inputs * (weight @ self.dXXT)
            if self._lost is not None:
                # The library's sums are those of two halves of the mean over samples.
                wanted += correction.residual * 2 / self.nsamples * self._lost
            self.module.weight.data = moved(weight, self.H, wanted, regularization(weight.shape[1])).to(
                self.module.weight.dtype
            )
            self.dXXT = self._lost = None
            return solver.quantize(self, blocksize=blocksize)

        def free(self) -> None:
            self.dXXT = self._lost = None
            solver.free(self)

    return Corrected
