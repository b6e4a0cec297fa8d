"""Base + recipe -> calibrate -> quantize -> evaluate -> seal."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

from config.manifest import Base, Calibration, Manifest, Quality, Quantizer
from quantize.backends import autogptq, gptqmodel
from quantize.backends.protocol import QuantizeResult, SolveJob, Solver
from quantize.base import read_base
from quantize.calibration import preflight
from quantize.calibration.datasets import (
    CalibrationSplit,
    Dataset,
    contents_digest,
    is_held_out,
    read_datasets,
    shipped_files,
)
from quantize.calibration.replica_client import Sampling
from quantize.calibration.samples import Samples, tokenize_samples
from quantize.calibration.self_generation import self_generate
from quantize.errors import CalibrationError, RecipeError
from quantize.evaluation.evaluate import EVIDENCE_FILE, EvaluationPlan, evaluate
from quantize.load_report import check_base
from quantize.mixed_precision.auto_scheme import resolve_auto
from quantize.modules import is_expert
from quantize.options import RunOptions
from quantize.planning.dry_run import lowest_bits
from quantize.planning.recipe import Recipe
from quantize.planning.request import Request, TextFile
from quantize.running.context import RunContext
from quantize.running.progress import ProgressReporter
from quantize.running.resume import resumed_line, solving
from quantize.schemes.forecast import disk_bytes
from quantize.variants.checkpoint import write_json
from quantize.variants.lint import require_clean
from quantize.variants.quant_log import QUANT_LOG
from quantize.variants.store import require_space, seal, staging, work_folder
from quantize.variants.weights import read_packing

SOLVERS: Mapping[str, Solver] = MappingProxyType({"gptqmodel": gptqmodel.solve, "auto-gptq": autogptq.solve})


def build_variant(recipe: Recipe, split: CalibrationSplit, out: Path, run_options: RunOptions) -> Manifest:
    """Turn a base into a sealed variant directory; `out` appears whole or not at all."""
    require_solvable(recipe)
    require_space(out, disk_bytes(recipe.base, recipe.scheme))
    with staging(out) as variant:
        context = RunContext(work_folder(variant), run_options.environ, run_options.progress)
        check_base(recipe.base, run_options.environ, run_options.progress)
        samples = tokenize_samples(recipe.base.directory, split, recipe.max_tokens, context)
        # Evaluation looks at the held-out side itself.
        preflight.check(recipe.base, replace(samples, held_out=[]), context, gpu=run_options.gpu)
        recipe = settled(recipe, samples, run_options, context)
        with solving(out, identity_of(recipe, samples), resume=run_options.resume) as checkpoint:
            solve_job = SolveJob(
                variant,
                context.folder,
                checkpoint,
                run_options.environ,
                run_options.allow_fallback,
                run_options.expert_fallback,
            )
            solved = quantize(recipe, samples, solve_job, run_options)
        write_modules(variant, solved)
        require_clean(variant, recipe.base, recipe.scheme)
        quality = evaluate(
            variant,
            recipe.base.directory,
            samples.held_out,
            lowest_bits(recipe.scheme),
            context,
            plan=with_recipe_limits(run_options.evaluation, recipe, run_options.allow_fallback),
            base_digest=recipe.base.digest,
            evidence=variant / EVIDENCE_FILE,
        )
        return seal(variant, describe(recipe, samples, solved, quality))


def evaluate_directory(
    variant: Path,
    base: Path,
    data: Sequence[Path],
    run_options: RunOptions,
    *,
    max_tokens: int,
    every_row: bool = False,
    evidence: Path | None = None,
) -> Quality:
    """Measure any readable variant against a base, on the held-out rows of `data` or on all of them."""
    bits = read_packing(variant).bits
    parent = read_base(base)
    datasets, records = read_datasets(data)
    log_datasets(datasets, run_options.progress)
    held_out = tuple(record for record in records if every_row or is_held_out(record))
    if not held_out:
        raise CalibrationError(["no held-out rows to evaluate on; pass more text with --data, or --every-row"])
    with run_context(run_options) as context:
        samples = tokenize_samples(base, CalibrationSplit((), held_out), max_tokens, context).held_out
        return evaluate(
            variant,
            base,
            samples,
            bits,
            context,
            plan=run_options.evaluation,
            base_digest=parent.digest,
            evidence=evidence,
        )


def with_self_generated(request: Request, run_options: RunOptions) -> Request:
    """Let the base answer prompts of the text where that was asked for; its answers join the calibration text.

    Without text of the user's own the shipped prompts are answered, and the shipped answers only evaluate.
    """
    if request.self_generate == 0:
        return request
    files = request.data or tuple(TextFile(path, weight=0.0) for path in shipped_files())
    _, records = read_datasets([file.path for file in files], max_bad=request.max_bad)
    with run_context(run_options) as context:
        file = self_generate(
            read_base(request.base),
            records,
            request.self_generate,
            sampling=Sampling(request.max_tokens),
            seed=request.seed,
            url=request.replica,
            context=context,
        )
    return replace(request, data=(*files, TextFile(file)))


def log_datasets(datasets: Sequence[Dataset], progress: ProgressReporter) -> None:
    """Print what was found in calibration files, and what was skipped."""
    for dataset in datasets:
        for line in dataset.summary():
            progress.log(line)


@contextmanager
def run_context(run_options: RunOptions) -> Iterator[RunContext]:
    """Lend a scratch folder that is gone afterwards."""
    with TemporaryDirectory(prefix="quantgate-") as folder:
        yield RunContext(Path(folder), run_options.environ, run_options.progress)


def quantize(recipe: Recipe, samples: Samples, solve_job: SolveJob, run_options: RunOptions) -> QuantizeResult:
    """Solve for the integers and write the variant's files."""
    solver = SOLVERS[recipe.backend.name]
    resumed = resumed_line(solve_job.checkpoint)
    if resumed:
        run_options.progress.log(resumed)
    with run_options.progress.stage("quantize", "layers") as advance:
        return solver(
            recipe,
            samples.calibration,
            solve_job,
            on_progress=advance,
            on_event=partial(log_module, run_options.progress),
        )


def identity_of(recipe: Recipe, samples: Samples) -> str:
    """Digest what decides a run's solved layers: the recipe and the very tokens."""
    scheme = recipe.scheme.model_dump(mode="json")  # what a search found is not in the recipe's digest
    payload = json.dumps([recipe.digest(), scheme, [sample["ids"] for sample in samples.calibration]])
    return hashlib.sha256(payload.encode()).hexdigest()


def log_module(progress: ProgressReporter, event: Mapping[str, Any]) -> None:
    """Write a solved module into the run's log, and print an expert that too few tokens reached."""
    write = progress.log if event.get("undersampled") else progress.log_detail
    write(module_line(event))


def module_line(event: Mapping[str, Any]) -> str:
    """Tell a solved module in one line."""
    if event.get("undersampled"):
        reached = f"{event['tokens']} of {event['all_tokens']} tokens reached this expert"
        return f"{event['module']}: {reached}: rounded to nearest"
    if event["loss"] is None:
        return f"{event['module']}: rounded to nearest, not solved"
    beside = f", {event['loss_ratio']:.1f} times its kind's median" if event["loss_ratio"] else ""
    return f"{event['module']}: loss {event['loss']:.4g}{beside}, damping {event['damp']:g}"


def write_modules(variant: Path, solved: QuantizeResult) -> None:
    """Write the quant log: every quantized module with its bits, group size, loss and damping."""
    records = [
        {
            "module": module.module,
            "bits": module.bits,
            "group_size": module.group_size,
            "loss": module.loss,
            "damp": module.damp,
            "fallback": module.loss is None and not module.undersampled,
            **({"tokens": module.tokens, "undersampled": module.undersampled} if is_expert(module.module) else {}),
        }
        for module in sorted(solved.modules, key=lambda module: (module.layer, module.module))
    ]
    write_json(variant / QUANT_LOG, {"modules": records})


def require_solvable(recipe: Recipe) -> None:
    """Raise RecipeError, before any work, for what a recipe's backend has not."""
    if recipe.backend.name != "auto-gptq":
        return
    if any(layer.solver_name != layer.stored_name or layer.is_expert for layer in recipe.base.modules.layers):
        raise RecipeError("auto-gptq knows no experts, and no layers that share a matrix; use --backend gptqmodel")
    if recipe.budget:
        raise RecipeError("auto-gptq quantizes all modules alike, and `scheme: auto` doesn't; use --backend gptqmodel")
    autogptq.require_solvable(recipe.scheme, recipe.settings)


def settled(recipe: Recipe, samples: Samples, run_options: RunOptions, context: RunContext) -> Recipe:
    """Search the numbers of a recipe that has a budget for them; any other recipe has its scheme already."""
    if recipe.budget is None:
        return recipe
    scheme = resolve_auto(
        recipe.base,
        samples.calibration,
        recipe.budget,
        run_options.engine,
        context,
        tensor_parallel=run_options.tensor_parallel,
        settings=recipe.settings,
    )
    return replace(recipe, scheme=scheme)


def with_recipe_limits(plan: EvaluationPlan, recipe: Recipe, fallbacks: int) -> EvaluationPlan:
    """Limit an evaluation by what was asked for: the divergence of a budget, and rounded modules that are accepted."""
    asked: dict[str, float] = {"fallback_modules": fallbacks} if fallbacks else {}
    if recipe.budget and recipe.budget.max_kl is not None:
        asked["kl_mean"] = recipe.budget.max_kl
    return replace(plan, limits={**asked, **plan.limits})


def describe(recipe: Recipe, samples: Samples, solved: QuantizeResult, quality: Quality) -> dict[str, object]:
    """Write down where a variant comes from, how it was made and how good it is: a manifest without its seal."""
    taken = samples.calibration
    calibration = Calibration(
        sha256=contents_digest(sample["sha256"] for sample in taken),
        samples=len(taken),
        tokens=sum(len(sample["ids"]) for sample in taken),
        reasoning_tokens=sum(sample["reasoning_tokens"] for sample in taken),
        max_tokens=recipe.max_tokens,
        seed=recipe.seed,
        generated=sum(bool(sample["generated"]) for sample in taken),
        skipped_rows=samples.refused_rows + sum(len(dataset.skipped) for dataset in recipe.datasets),
    )
    quantizer = Quantizer(
        backend=recipe.backend.name,
        version=recipe.backend.version,
        seconds=solved.seconds,
        settings=settings_payload(recipe),
        damp=dict(solved.damp),
        modules=len(solved.modules),
        fallback_modules=solved.fallback_modules,
        experts=solved.experts,
    )
    return {
        "id": recipe.variant_id,
        "base": Base(name=recipe.base.name, digest=recipe.base.digest, dtype=recipe.base.dtype),
        "scheme": recipe.scheme,
        "calibration": calibration,
        "quantizer": quantizer,
        "quality": quality,
    }


def settings_payload(recipe: Recipe) -> dict[str, str | float | bool]:
    """Tell the solver's settings as a manifest does: numbers, words and booleans only."""
    return {**asdict(recipe.settings), "damp": " ".join(f"{step:g}" for step in recipe.settings.damp)}
