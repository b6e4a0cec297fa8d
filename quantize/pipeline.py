"""Base + recipe -> a sealed variant, in five stages: tokens -> solve -> checkpoint -> evaluation -> seal.

A recipe with transforms has one more, after the tokens: solve and checkpoint then read the transformed base. One with
an FP8 KV cache has one more, after solve: it measures the scales of keys and values.

Each stage keeps its result in `$QUANTGATE_HOME/stages` (`quantize.running.stage_store`) under a digest of its inputs.
A run that stops loses only the stage that it was in: the same command continues there.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from config.manifest import Manifest
from config.quality import Quality
from quantize.base import BaseModel, read_base, with_digest
from quantize.calibration.datasets import (
    CalibrationSplit,
    Dataset,
    is_held_out,
    read_datasets,
)
from quantize.calibration.replica_client import Sampling
from quantize.calibration.samples import tokenize_samples
from quantize.calibration.self_generation import self_generate
from quantize.checks import prompt_files
from quantize.errors import CalibrationError, SpaceError
from quantize.evaluation.evaluate import evaluate
from quantize.evaluation.tasks import read_questions
from quantize.evaluation.verdict import limits_for
from quantize.model_files.weight_files import weight_files
from quantize.options import RunOptions
from quantize.planning.recipe import Recipe
from quantize.planning.request import Request, TextFile
from quantize.planning.run_costs import require_evaluation_room
from quantize.running.context import RunContext
from quantize.running.memory import present_machine
from quantize.running.progress import ProgressReporter
from quantize.running.stage_store import stage_store
from quantize.running.worker import is_disk_full, visible
from quantize.stages.cache_scales import measure_cache_scales, weights_alone
from quantize.stages.checkpoint import write
from quantize.stages.evaluation import measure_variant
from quantize.stages.sealing import seal_variant
from quantize.stages.solve import settle_scheme, solve
from quantize.stages.tokens import tokenize
from quantize.stages.transform import transform
from quantize.stages.variant_run import VariantRun, kept_after_failure
from quantize.variants.weight_bits import read_weight_bits
from quantize.variants.weights import read_packing


def build_variant(recipe: Recipe, split: CalibrationSplit, out: Path, options: RunOptions) -> Manifest:
    """Turn a base into a sealed variant directory; `out` appears as a whole or not at all."""
    with variant_run(recipe, options) as begun:
        tokens = tokenize(begun, split)
        solving = settle_scheme(transform(begun, tokens), tokens)
        run = replace(begun, recipe=replace(begun.recipe, scheme=solving.recipe.scheme))
        solved = solve(weights_alone(solving), tokens)
        scales = measure_cache_scales(solving, tokens)
        with kept_after_failure(run, "the solved layers are"):
            checkpoint = write(solving, solved, scales)
            evaluated = measure_variant(run, tokens, checkpoint)
            return seal_variant(run, out, tokens, solved, checkpoint, evaluated)


@contextmanager
def variant_run(recipe: Recipe, options: RunOptions) -> Iterator[VariantRun]:
    """Lend a run with a scratch folder on the disk of the stages; SpaceError if a disk is full."""
    store = stage_store(options.environ)
    store.sweep()
    try:
        with store.scratch() as folder:
            yield VariantRun(recipe, options, RunContext(folder, options.environ, options.progress), store)
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise SpaceError(
            f"no space left on the disk of {visible(Path(error.filename or store.root))}; "
            "free some, or set QUANTGATE_HOME to a directory on a larger disk"
        ) from error


def evaluate_directory(
    variant: Path,
    base: Path,
    data: Sequence[Path],
    options: RunOptions,
    *,
    max_tokens: int,
    every_row: bool = False,
    evidence: Path | None = None,
) -> Quality:
    """Measure a variant against a base, on the held-out rows of `data` or on all of them.

    Any that transformers or this package can read; through a replica, any that the replica serves.
    """
    served = options.evaluation.replica is not None
    bits = read_weight_bits(variant) if served else read_packing(variant).bits
    limits_for(bits, options.evaluation.limits)
    if options.evaluation.tasks:
        read_questions(options.evaluation.tasks)
    datasets, records = read_datasets(data)
    log_datasets(datasets, options.progress)
    held_out = tuple(record for record in records if every_row or is_held_out(record))
    if not held_out:
        raise CalibrationError(["no held-out rows to evaluate on; pass more text with --data, or --every-row"])
    parent = read_base(base, digested=False)
    if not served:
        variant_bytes = sum(file.stat().st_size for file in weight_files(variant))
        require_evaluation_room(parent, options.evaluation, variant_bytes, present_machine())
    parent = with_digest(parent)
    with run_context(options) as context:
        samples = tokenize_samples(base, CalibrationSplit((), held_out), max_tokens, context).held_out
        return evaluate(
            variant,
            base,
            samples,
            bits,
            context,
            plan=options.evaluation,
            base_digest=parent.digest,
            evidence=evidence,
        )


def with_self_generated(request: Request, base: BaseModel, options: RunOptions) -> Request:
    """Let the base answer prompts of the data where that was asked for; its answers join the calibration data."""
    if request.self_generate == 0:
        return request
    files = prompt_files(request)
    _, records = read_datasets([file.path for file in files], max_bad=request.max_bad)
    with run_context(options) as context:
        file = self_generate(
            base,
            records,
            request.self_generate,
            sampling=Sampling(request.max_tokens),
            seed=request.seed,
            url=request.replica,
            context=context,
        )
    return replace(request, data=(*files, TextFile(file)))


def log_datasets(datasets: Sequence[Dataset], progress: ProgressReporter) -> None:
    """Log what was found in calibration files, and what was skipped."""
    for dataset in datasets:
        for line in dataset.summary():
            progress.log(line)


@contextmanager
def run_context(options: RunOptions) -> Iterator[RunContext]:
    """Lend a scratch folder that is gone afterwards."""
    with TemporaryDirectory(prefix="quantgate-") as folder:
        yield RunContext(Path(folder), options.environ, options.progress)
