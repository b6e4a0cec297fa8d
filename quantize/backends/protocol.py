"""What the pipeline asks of a quantizing program."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from quantize.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Solved:
    """How solving went: seconds, quantized modules, and how many modules needed which damping."""

    seconds: float
    modules: int
    damp: Mapping[str, int]


class Solver(Protocol):
    """Turns a recipe and token samples into a variant's files.

    On return `into` holds everything vLLM loads. A module that was rounded to nearest instead of solved raises
    SolveError with its name; nothing is left to the caller's guess.
    """

    def __call__(
        self,
        recipe: Recipe,
        samples: list[dict[str, Any]],
        *,
        into: Path,
        work: Path,
        environ: Mapping[str, str],
        on_progress: Callable[[int, int], None],
    ) -> Solved: ...
