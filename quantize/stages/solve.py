"""Stage 2, solve: token samples -> the integers of every quantized module, layer by layer."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from quantize.backends import autogptq, fp8, gptqmodel
from quantize.backends.losses import SolvedModule, require_solved
from quantize.backends.protocol import QuantizeResult, SolveJob, Solver
from quantize.calibration import preflight
from quantize.calibration.samples import Samples
from quantize.planning.recipe import Recipe
from quantize.running.progress import ProgressReporter
from quantize.running.stage_store import StageKey, StageResult, stage_key
from quantize.schemes.makers import RTN_FP8, is_data_free
from quantize.stages.tokens import Tokens
from quantize.stages.variant_run import VariantRun, kept_after_failure

SOLVERS: Mapping[str, Solver] = MappingProxyType(
    {"gptqmodel": gptqmodel.solve, "auto-gptq": autogptq.solve, RTN_FP8: fp8.solve}
)


@dataclass(frozen=True, slots=True)
class SolvedLayers:
    """The folder with the solved modules of all layers, and what the solver reports of them.

    `parts` are the solutions that they were put together from, and those that a search tried beside them.
    """

    directory: Path
    result: QuantizeResult
    key: StageKey
    parts: tuple[StageKey, ...] = ()


def solve(run: VariantRun, tokens: Tokens) -> SolvedLayers:
    """Solve all layers, or those that an equal run that was stopped left to do.

    SolveError if more modules than `allow_fallback` were only rounded to nearest; the solved layers are kept, so
    that a run that allows more of them continues from here.
    """
    run = _weights_alone(run)
    key = solve_key(run.recipe, tokens.samples, run.options.expert_fallback)
    if not run.options.resume:
        run.store.forget(key)
    found = run.find(key) or _solved(run, tokens.samples, key)
    modules = [SolvedModule(**row) for row in found.facts["modules"]]
    with kept_after_failure(run, "solve: all layers are"):
        require_solved(modules, run.options.allow_fallback)
    seconds = found.facts["seconds"]
    if is_data_free(run.recipe.scheme):
        return SolvedLayers(found.directory, QuantizeResult(seconds, tuple(modules), {}), key)
    return SolvedLayers(found.directory, QuantizeResult.of(seconds, modules), key)


def _weights_alone(run: VariantRun) -> VariantRun:
    """Return a run for the weights, which are the same with any KV cache."""
    recipe = run.recipe
    return replace(run, recipe=replace(recipe, scheme=recipe.scheme.model_copy(update={"kv_cache": None})))


def solve_key(recipe: Recipe, samples: Samples, expert_fallback: str) -> StageKey:
    """Digest what decides the solved layers: the recipe, the scheme that a search found, and the very tokens."""
    if is_data_free(recipe.scheme):
        return stage_key("solve", recipe=recipe.digest())
    return stage_key(
        "solve",
        recipe=recipe.digest(),
        scheme=recipe.scheme.identity(),
        samples=[sample["ids"] for sample in samples.calibration],
        expert_fallback=expert_fallback,
    )


def completed_layers(folder: Path) -> int:
    """Count the layers that a folder of solved modules has as a whole."""
    return len(list(folder.glob("layer-*.json")))


def _solved(run: VariantRun, samples: Samples, key: StageKey) -> StageResult:
    """Check the samples, then run the solver in the folder that a stopped run may have left."""
    if not is_data_free(run.recipe.scheme):
        preflight.check(run.recipe.base, samples, run.context)
    progress = run.context.progress
    with run.store.resumable(key) as folder:
        if completed_layers(folder):
            progress.log(f"solve: continues after {completed_layers(folder)} completed layers")
        try:
            with progress.stage("solve", "layers") as advance:
                result = SOLVERS[run.recipe.backend.name](
                    run.recipe,
                    samples.calibration,
                    _job(run, folder),
                    on_progress=advance,
                    on_event=partial(log_module, progress),
                )
        except BaseException:
            layers = completed_layers(folder)
            if layers:
                progress.log(f"solve: {layers} completed layers are kept; the same command continues after them")
            raise
        facts = {"seconds": result.seconds, "modules": [asdict(module) for module in result.modules]}
        return run.store.keep(key, folder, facts, subject=run.recipe.variant_id, cache=False)


def _job(run: VariantRun, folder: Path) -> SolveJob:
    return SolveJob(folder, run.context.folder, run.options.environ, run.options.expert_fallback)


def log_module(progress: ProgressReporter, event: Mapping[str, Any]) -> None:
    """Write a solved module into the run's log, and print an expert that too few tokens reached."""
    write = progress.log if event.get("undersampled") else progress.log_detail
    write(module_line(event))


def module_line(event: Mapping[str, Any]) -> str:
    """Describe a solved module in one line."""
    if event.get("undersampled"):
        reached = f"{event['tokens']} of {event['all_tokens']} tokens reached this expert"
        return f"{event['module']}: {reached}: rounded to nearest"
    if event["loss"] is None:
        return f"{event['module']}: rounded to nearest, not solved"
    ratio = f", {event['loss_ratio']:.1f} times its kind's median" if event["loss_ratio"] else ""
    return f"{event['module']}: loss {event['loss']:.4g}{ratio}, damping {event['damp']:g}"
