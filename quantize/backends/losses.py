"""What solving left, module by module: how large the error is beside its kind's, and what is no solution."""

import math
from bisect import insort
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from config.manifest import ExpertCoverage
from quantize.errors import SolveError
from quantize.modules import is_expert

# GPTQModel writes 999999999 for a module whose loss it never learned.
_ABSURD_LOSS = 1e8
_NAMES_SHOWN = 5


@dataclass(frozen=True, slots=True)
class SolvedModule:
    """One linear layer after solving; `loss` is the mean output error a token, or None where it was only rounded.

    `tokens` of the calibration text reached it; for an `undersampled` expert these were too few for GPTQ.
    """

    module: str
    layer: int
    bits: int
    group_size: int
    loss: float | None
    damp: float
    tokens: int = 0
    undersampled: bool = False

    @property
    def kind(self) -> str:
        """Its name inside a layer, like `down_proj`: losses compare within a kind."""
        return self.module.rpartition(".")[2]


def as_loss(value: Any) -> float | None:
    """Read a loss of GPTQModel's log: a number, or words where it rounded to nearest instead."""
    try:
        loss = float(value)
    except (TypeError, ValueError):
        return None
    return loss if math.isfinite(loss) and loss < _ABSURD_LOSS else None


def fallbacks(modules: Iterable[SolvedModule]) -> tuple[str, ...]:
    """Name the modules that were rounded to nearest although enough tokens reached them."""
    return tuple(solved.module for solved in modules if solved.loss is None and not solved.undersampled)


def expert_coverage(modules: Iterable[SolvedModule]) -> ExpertCoverage | None:
    """Count the tokens that the experts saw; None for a model without experts."""
    experts: dict[str, SolvedModule] = {}
    for solved in modules:
        if is_expert(solved.module):
            experts[solved.module.rpartition(".")[0]] = solved
    if not experts:
        return None
    tokens = [solved.tokens for solved in experts.values()]
    undersampled = tuple(name for name, solved in experts.items() if solved.undersampled)
    return ExpertCoverage(
        experts=len(experts), fewest_tokens=min(tokens), median_tokens=int(median(tokens)), undersampled=undersampled
    )


def require_solved(modules: Sequence[SolvedModule], allowed: int) -> None:
    """Raise SolveError if more than `allowed` modules were rounded to nearest; the message names them."""
    bad = fallbacks(modules)
    if len(bad) <= allowed:
        return
    more = f" and {len(bad) - _NAMES_SHOWN} more" if len(bad) > _NAMES_SHOWN else ""
    raise SolveError(
        f"{len(bad)} of {len(modules)} modules were rounded to nearest instead of solved: "
        f"{', '.join(bad[:_NAMES_SHOWN])}{more}; add samples, or accept them with --allow-fallback {len(bad)}",
    )


def by_damping(modules: Iterable[SolvedModule]) -> dict[str, int]:
    """Count modules by the damping they needed."""
    return dict(Counter(f"{solved.damp:g}" for solved in modules if solved.loss is not None))


@dataclass(slots=True)
class LossMedians:
    """The losses of each kind of module so far, in order; a model with experts has tens of thousands of modules."""

    losses: dict[str, list[float]] = field(default_factory=dict)

    def ratio(self, solved: SolvedModule) -> float | None:
        """Add a module, and divide its loss by the median of its kind; None where there is nothing to compare."""
        if solved.loss is None:
            return None
        kind = self.losses.setdefault(solved.kind, [])
        insort(kind, solved.loss)
        middle = len(kind) // 2
        usual = kind[middle] if len(kind) % 2 else (kind[middle - 1] + kind[middle]) / 2
        return solved.loss / usual if usual > 0 else None
