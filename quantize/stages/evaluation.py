"""Stage 4, evaluation: the variant and its parent on held-out text -> figures, and what lies behind them."""

from dataclasses import asdict, replace
from importlib import metadata

from config.measurements import EVALUATION_FILE
from quantize.evaluation.evaluate import EvaluationPlan, measure, within_plan
from quantize.evaluation.tasks import dataset_digest, read_questions
from quantize.planning.recipe import Recipe
from quantize.running.stage_store import StageResult, stage_key
from quantize.stages.tokens import Tokens
from quantize.stages.variant_run import VariantRun
from quantize.variants.checkpoint import write_json

# Raise this when the same models are measured otherwise.
_REVISION = 2
_LIBRARIES = ("torch", "transformers")


def measure_variant(run: VariantRun, tokens: Tokens, checkpoint: StageResult) -> StageResult:
    """Measure a variant on the held-out samples; the limits have no part in it, and are applied when it is sealed."""
    plan = run.options.evaluation
    key = stage_key(
        "evaluation",
        revision=_REVISION,
        libraries=[metadata.version(name) for name in _LIBRARIES],
        checkpoint=str(checkpoint.key),
        held_out=[sample["ids"] for sample in within_plan(tokens.samples.held_out, plan)],
        plan=asdict(replace(plan, tasks=None, limits={})),
        tasks=dataset_digest(read_questions(plan.tasks)) if plan.tasks else "",
    )
    if not run.options.resume:
        run.store.forget(key)
    found = run.find(key)
    if found is not None:
        return found
    evaluation = measure(
        checkpoint.directory,
        run.recipe.base.directory,
        tokens.samples.held_out,
        run.context,
        plan=plan,
        base_digest=run.recipe.base.digest,
    )
    with run.store.staging(key) as staged:
        write_json(staged / EVALUATION_FILE, evaluation.to_json())
        return run.store.keep(key, staged, {}, subject=run.recipe.variant_id, cache=False)


def with_recipe_limits(plan: EvaluationPlan, recipe: Recipe, fallbacks: int) -> EvaluationPlan:
    """Limit an evaluation by the request: the KL divergence of a budget, and the RTN modules that are allowed."""
    requested: dict[str, float] = {"fallback_modules": fallbacks} if fallbacks else {}
    if recipe.budget and recipe.budget.max_kl is not None:
        requested["kl_mean"] = recipe.budget.max_kl
    return replace(plan, limits={**requested, **plan.limits})
