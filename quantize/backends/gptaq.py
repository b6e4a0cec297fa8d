"""Weights that make up for what earlier layers' rounding did to a layer's inputs, before they are rounded themselves.

GPTQ keeps W X for the inputs X that the quantized layers before give; what should be kept is W X0, with X0 the
unquantized model's inputs. The weights closest to that are W + W C (X X')^-1 with C = (X0 - X) X' (GPTAQ, arXiv
2504.02692, equation 9). GPTQModel gathers X X' and C; its own solver for them knows no order inside groups, so the
weights are moved first and then solved as any others.
"""

from typing import Any

# Of the mean diagonal: the correction is a guess from few tokens, so weakly seen directions are left alone.
_DAMP = 0.01


def moved(weights: Any, hessian: Any, drift: Any, share: float) -> Any:
    """Move `weights` [N, K] by `share` of the correction for `drift` [K, K], given the `hessian` [K, K]."""
    import torch  # noqa: PLC0415

    damped = hessian.clone()
    damped.diagonal().add_(_DAMP * hessian.diagonal().mean())
    return weights + share * torch.linalg.solve(damped, (weights @ drift).T).T


def residual_corrected(solver: Any, gatherer: Any, share: float) -> type:
    """Derive from GPTQModel's `GPTAQ`, which gathers both inputs, a class that moves weights and solves as `GPTQ`."""

    class Aligned(gatherer):  # type: ignore[misc]
        dXXT: Any  # noqa: N815 - the library's name for C

        def quantize(self, blocksize: int = 128) -> Any:
            weight = self.module.weight
            weight.data = moved(weight.data.float(), self.H, self.dXXT, share).to(weight.dtype)
            self.dXXT = None
            return solver.quantize(self, blocksize=blocksize)

        def free(self) -> None:
            self.dXXT = None
            solver.free(self)

    return Aligned
