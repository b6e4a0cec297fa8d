"""What the pipeline asks of a quantizing program."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from config.manifest import ExpertCoverage
from quantize.backends.losses import SolvedModule
from quantize.planning.recipe import Recipe

ExpertFallback = Literal["rtn", "fail"]


@dataclass(frozen=True, slots=True)
class SolveJob:
    """Where a solver works: `into` becomes the variant, `work` is thrown away, `solutions` outlives a stopped run.

    `allow_fallback` modules may be rounded to nearest where GPTQ finds nothing. Experts that the calibration text
    hardly reaches are not among them: with `expert_fallback` "rtn" they are rounded to nearest, with "fail" they are
    an error.
    """

    into: Path
    work: Path
    checkpoint: Path
    environ: Mapping[str, str]
    allow_fallback: int = 0
    expert_fallback: ExpertFallback = "rtn"


@dataclass(frozen=True, slots=True)
class QuantizeResult:
    """How solving went: seconds, every module, how many needed which damping, and which were only rounded."""

    seconds: float
    modules: tuple[SolvedModule, ...]
    damp: Mapping[str, int]
    fallback_modules: tuple[str, ...] = ()
    experts: ExpertCoverage | None = None


class Solver(Protocol):
    """Turns a recipe and token samples into a variant's files.

    On return `solve_job.into` holds everything vLLM loads. More modules than allowed that were rounded to nearest
    instead of solved raise SolveError with their names; nothing is left to the caller's guess.
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
