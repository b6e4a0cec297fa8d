"""Weights that make up for what earlier layers' rounding did, before they are rounded themselves.

GPTQ keeps W X for the inputs X that the quantized layers before give; what should be kept is W X0, with X0 the
unquantized model's inputs. The weights closest to that are W + W C (X X')^-1 with C = (X0 - X) X' (GPTAQ, arXiv
2504.02692, equation 9). The output of some layers is added to the residual stream, which is H where the unquantized
model has H0: the weights closest to W X0 + H0 - H are moved by (H0 - H) X' (X X')^-1 more (the aim is that of LoaQ,
arXiv 2509.06297). GPTQModel gives X and X0; its own solver for them knows no order inside groups, so the weights are
moved first and then solved as any others.

Of layers with no more outputs than inputs, which no other layer reads (o, down), W X0 is kept instead of X0: W C is
(W X0 - W X) X', and both outputs are computed anyway. For a down projection that takes a fifth to two fifths of the
memory, and less than half of the arithmetic.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

from quantize.backends.regularization import Regularization, lower_factors
from quantize.backends.residual_stream import ResidualStreams, keeps_outputs
from quantize.schemes.module_config import fused_name

_STRIPS = 4  # of a symmetric product, so that 10 of 16 blocks are computed

# Gives the regularization of a module with so many inputs.
Regularizations = Callable[[int], Regularization]


@dataclass(frozen=True, slots=True)
class Correction:
    """How much is made up for: shares of the error of a layer's inputs, and of that of the residual stream."""

    inputs: float
    residual: float


class Moments:
    """Sums over samples that all layers with the same input share: X X' [K, K], and C [K, K] of the drifted inputs."""

    def __init__(self) -> None:
        self.hessian: Any = None
        self.drift: Any = None

    def add(self, inputs: Any, unquantized: Any | None = None) -> None:
        """Add a sample: both are [T, K]; without the unquantized model's inputs nothing is added to C."""
        self.hessian = _plus(self.hessian, second_moments(inputs))
        if unquantized is not None:
            self.drift = _plus(self.drift, (unquantized - inputs).T @ inputs)


def second_moments(inputs: Any) -> Any:
    """Compute X X' [K, K] of inputs [T, K] in strips of columns, each from the diagonal on: it is symmetric."""
    import torch  # noqa: PLC0415

    columns = inputs.shape[1]
    strip = -(-columns // _STRIPS)
    product = torch.empty(columns, columns, dtype=inputs.dtype, device=inputs.device)
    for first in range(0, columns, strip):
        last = min(first + strip, columns)
        product[first:last, first:] = inputs[:, first:last].T @ inputs[:, first:]
        product[last:, first:last] = product[first:last, last:].T
    return product


def _plus(total: Any | None, product: Any) -> Any:
    return product if total is None else total.add_(product)


def moved(weights: Any, hessian: Any, wanted: Any, regularization: Regularization) -> Any:
    """Move `weights` [N, K] so that outputs change as wanted; `wanted` [N, K] are the sums of changes times inputs.

    It is a guess from few tokens, as the Hessian is: directions that they hardly have are left alone. Weights whose
    Hessian does not factor stay.
    """
    import torch  # noqa: PLC0415

    found = next(lower_factors(hessian, regularization), None)
    return weights if found is None else weights + torch.cholesky_solve(wanted.T, found[0]).T


def corrected(
    solver: Any, gatherer: Any, correction: Correction, streams: ResidualStreams, regularization: Regularizations
) -> type:
    """Derive from GPTQModel's `GPTAQ`, which is given both inputs, a class that moves weights and solves as `GPTQ`."""
    shared: WeakValueDictionary[str, Moments] = WeakValueDictionary()

    class Corrected(gatherer):  # type: ignore[misc]
        def __init__(self, *arguments: Any, **keywords: Any) -> None:
            super().__init__(*arguments, **keywords)
            self._wanted: Any = None
            name = fused_name(self._named_module.full_name)
            self._leads = name not in shared
            self._moments: Any = shared.setdefault(name, Moments())

        def add_batch(self, inp: Any, out: Any, **_place: Any) -> None:
            module = self._named_module
            inputs = inp.reshape(-1, inp.shape[-1]).float()
            kept = self.native_inps.pop(0).to(inputs.device)
            kept = kept.reshape(-1, kept.shape[-1]).float()
            change = None
            if keeps_outputs(module):
                self._moments.add(inputs)
                change = correction.inputs * (kept - out.reshape(kept.shape).float())
            elif self._leads:
                self._moments.add(inputs, kept)
            lost = streams.lost(module.full_name, out)
            if lost is not None:
                change = _plus(change, correction.residual * lost)
            if change is not None:
                self._wanted = _plus(self._wanted, change.T @ inputs)
            self.nsamples += 1
            self.fwd_counter += 1

        def quantize(self, blocksize: int = 128) -> Any:
            weight = self.module.weight.data.float()
            wanted = self._wanted
            if self._moments.drift is not None:
                wanted = _plus(wanted, correction.inputs * (weight @ self._moments.drift))
            weight = moved(weight, self._moments.hessian, wanted, regularization(weight.shape[1]))
            self.module.weight.data = weight.to(self.module.weight.dtype)
            self.H = self._moments.hessian * (2 / self.nsamples)  # its own: the solver changes it
            self._moments = self._wanted = None
            return solver.quantize(self, blocksize=blocksize)

        def free(self) -> None:
            self._moments = self._wanted = None
            solver.free(self)

    return Corrected
