"""How hard the solver tries: what GPTQ does with a module's activations, as two named presets."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

DAMPING_LADDER = (0.01, 0.02, 0.05, 0.1)


@dataclass(frozen=True, slots=True)
class SolverSettings:
    """Settings that change a variant's bytes, beside its scheme and its text.

    `damp` are shares of the Hessian's typical diagonal that are added to it, tried in order until it factors.
    `shrinkage` is added before: so many times the inputs of a module over the tokens it was seen with, since few tokens
    say little of many inputs (0: none). Without it, `damp` are shares of the mean diagonal, as in other tools.
    `group_order` sorts inputs by activation inside groups, free at run time. `weighted_scales` searches each group's
    scale for the error that GPTQ will be charged for; without it `scale_norm` is the power of the plain error that
    the library's search minimises, and 0 takes the largest weight. `gptaq` is the share of the error that earlier
    layers left in a layer's inputs which the weights make up for (0: none; arXiv 2504.02692), `residual` that of the
    error in the residual stream (0: none, as without `gptaq`).
    """

    damp: tuple[float, ...] = DAMPING_LADDER
    group_order: bool = True
    weighted_scales: bool = True
    scale_norm: float = 0.0
    gptaq: float = 0.5
    residual: float = 0.5
    shrinkage: float = 4.0
    true_sequential: bool = True


SETTINGS: Mapping[str, SolverSettings] = MappingProxyType(
    {
        "best": SolverSettings(),
        # What the usual AutoGPTQ script does.
        "classic": SolverSettings(
            damp=(0.01,), group_order=False, weighted_scales=False, gptaq=0.0, residual=0.0, shrinkage=0.0
        ),
    },
)


def without_gptaq(settings: SolverSettings) -> SolverSettings:
    """Leave out what needs the unquantized model's inputs."""
    return replace(settings, gptaq=0.0, residual=0.0)
