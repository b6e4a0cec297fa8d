"""FP8 by rounding to nearest: no calibration data, one matrix in memory at a time."""

from collections.abc import Callable
from typing import Any

from quantize.backends.losses import SolvedModule
from quantize.backends.protocol import QuantizeResult, SolveJob
from quantize.planning.recipe import Recipe
from quantize.running.worker import run_worker
from quantize.schemes.module_config import weight_args_of

_CHILD = "quantize.backends.fp8_child"


def solve(
    recipe: Recipe,
    samples: list[dict[str, Any]],  # noqa: ARG001 - a solver's signature; rounding needs no text
    solve_job: SolveJob,
    *,
    on_progress: Callable[[int, int], None],
    on_event: Callable[[dict[str, Any]], None],
) -> QuantizeResult:
    """Round the weights of a recipe's base to FP8 E4M3 in a child process, one file for each module in `into`.

    The loss of a module is the squared error of its weights relative to their square.
    """
    block = recipe.scheme.weights.block_structure
    result = run_worker(
        _CHILD,
        {
            "base": str(recipe.base.directory.resolve()),
            "tree": recipe.base.modules.as_json(),
            "modules": [name for name in recipe.base.shapes if weight_args_of(name, recipe.scheme)],
            "block": list(block) if block else None,
            "into": str(solve_job.into.resolve()),
        },
        folder=solve_job.work,
        environ=solve_job.environ,
        on_progress=on_progress,
        on_event=on_event,
    )
    modules = tuple(SolvedModule(**row) for row in result["modules"])
    return QuantizeResult(result["seconds"], modules, {})
