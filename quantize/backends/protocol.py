"""What the pipeline asks of a quantizing program."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from config.manifest import ExpertCoverage
from quantize.backends.losses import SolvedModule, by_damping, expert_coverage, fallbacks
from quantize.planning.recipe import Recipe

ExpertFallback = Literal["rtn", "fail"]


@dataclass(frozen=True, slots=True)
class SolveJob:
    """Where a solver works: solved modules go to `into`, which outlives a stopped run; `work` is removed.

    Experts that the calibration data hardly reaches are rounded to nearest with `expert_fallback` "rtn", and an error
    with "fail".
    """

    into: Path
    work: Path
    environ: Mapping[str, str]
    expert_fallback: ExpertFallback = "rtn"


@dataclass(frozen=True, slots=True)
class QuantizeResult:
    """How solving went: seconds, every module, how many needed which damping, and which were only rounded."""

    seconds: float
    modules: tuple[SolvedModule, ...]
    damp: Mapping[str, int]
    fallback_modules: tuple[str, ...] = ()
    experts: ExpertCoverage | None = None

    @classmethod
    def of(cls, seconds: float, modules: Sequence[SolvedModule]) -> "QuantizeResult":
        """Sum up what was solved."""
        return cls(seconds, tuple(modules), by_damping(modules), fallbacks(modules), expert_coverage(modules))


class Solver(Protocol):
    """Solves the modules of a recipe's base on token samples.

    On return `solve_job.into` has every module, as `quantize.backends.packing` reads them. Modules that were only
    rounded to nearest are among them, with no loss.
    """

    def __call__(
        self,
        recipe: Recipe,
        samples: list[dict[str, Any]],
        solve_job: SolveJob,
        *,
        on_progress: Callable[[int, int], None],
        on_event: Callable[[dict[str, Any]], None],
    ) -> QuantizeResult: ...
