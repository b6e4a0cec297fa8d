"""Between tokens and solve: the base -> an equal base whose weights are easier to round.

The solver and the checkpoint read the transformed base; the evaluation compares with the original one.
"""

from dataclasses import replace
from importlib import metadata
from typing import Any

from quantize.base import BaseModel, read_base
from quantize.module_tree import with_module_tree
from quantize.planning.recipe import Recipe
from quantize.running.stage_store import StageKey, StageResult, stage_key
from quantize.running.worker import run_worker
from quantize.schemes.module_config import weight_args_of
from quantize.stages.tokens import Tokens
from quantize.stages.variant_run import VariantRun

_CHILD = "quantize.transforms.transform_child"
# Raise this when the same base is transformed otherwise.
_REVISION = 2
_LIBRARIES = ("torch", "transformers")
# The search reads this much text; more changes its choices no more.
_SEARCH_SAMPLES = 16


def transform(run: VariantRun, tokens: Tokens) -> VariantRun:
    """Return a run whose base is the transformed one; the same run where the recipe has no transforms."""
    if not run.recipe.transforms:
        return run
    job = transform_job(run.recipe, tokens)
    key = stage_key(
        "transform",
        revision=_REVISION,
        libraries=[metadata.version(name) for name in _LIBRARIES],
        base=run.recipe.base.digest,
        job=job,
    )
    found = run.find(key) or _transformed(run, job, key)
    base = with_module_tree(read_base(found.directory, digested=False), run.options.environ)
    return replace(run, recipe=replace(run.recipe, base=_named_as(base, run.recipe.base, key)))


def transform_job(recipe: Recipe, tokens: Tokens) -> dict[str, Any]:
    """Describe the work by all that decides its result; paths come later."""
    ids = [sample["ids"] for sample in tokens.samples.calibration[:_SEARCH_SAMPLES]]
    return {
        "transforms": list(recipe.transforms),
        "seed": recipe.seed,
        "samples": ids if "smooth" in recipe.transforms else [],
        "roundings": _roundings(recipe),
    }


def _roundings(recipe: Recipe) -> dict[str, tuple[int, int, int]]:
    """Map each matrix of the base's files, experts left out, to the numbers of the module that it is written to."""
    dense = [layer for layer in recipe.base.modules.layers if not layer.is_expert]
    return {layer.tensor.removesuffix(".weight"): _numbers(recipe, layer.stored_name) for layer in dense}


def _numbers(recipe: Recipe, module: str) -> tuple[int, int, int]:
    """Tell bits, group size and bits of activations of a module; bits 0 where it is kept."""
    args = weight_args_of(module, recipe.scheme)
    return (args.bits, args.group_size, recipe.scheme.activation_bits) if args else (0, 0, 16)


def _transformed(run: VariantRun, job: dict[str, Any], key: StageKey) -> StageResult:
    context = run.context
    scratch = context.folder / "rotated"
    with run.store.staging(key) as staged, context.progress.stage("transform", "groups") as advance:
        paths = {"base": run.recipe.base.directory.resolve(), "scratch": scratch, "into": staged.resolve()}
        run_worker(
            _CHILD,
            {**job, **{name: str(path) for name, path in paths.items()}},
            folder=context.folder,
            environ=context.environ,
            on_progress=advance,
        )
        return run.store.keep(key, staged, {}, subject=run.recipe.variant_id)


def _named_as(base: BaseModel, original: BaseModel, key: StageKey) -> BaseModel:
    return replace(base, name=original.name, digest=str(key))
