"""Hold a variant against its base on held-out samples: run the measuring child, judge what it found."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from config.manifest import Quality
from quantize.calibration.datasets import contents_digest
from quantize.calibration.samples import within
from quantize.evaluation.module_checks import loss_outliers, module_figures, read_modules
from quantize.evaluation.tasks import read_questions
from quantize.evaluation.verdict import judge, limits_for
from quantize.running.context import RunContext
from quantize.running.stage_store import stage_store
from quantize.running.worker import run_worker
from quantize.variants.checkpoint import write_json

EVIDENCE_FILE = "evaluation.json"
# Held-out tokens that both models read; on two CPU cores 135M parameters take about 2 s per thousand and model.
EVALUATION_TOKENS = 4000
_SAMPLE_KEYS = ("ids", "sha256", "reasoning", "answer")
# Some held-out rows have no prompt, some the same one: so many are looked at for each that is wanted.
_TRIES_A_PROMPT = 4


@dataclass(frozen=True, slots=True)
class EvaluationPlan:
    """How much an evaluation measures, and which limits differ from those of the variant's precision.

    `tokens` held-out tokens are read; `prompts` of the held-out chats (0: none) are continued with each of `seeds`
    seeds for at most `new_tokens`; `tasks` is a JSONL file of questions, answered in at most `task_tokens` each.
    """

    tokens: int = EVALUATION_TOKENS
    prompts: int = 8
    seeds: int = 3
    new_tokens: int = 128
    tasks: Path | None = None
    task_tokens: int = 512
    limits: Mapping[str, float] = field(default_factory=dict)


DEFAULT_PLAN = EvaluationPlan()


@dataclass(frozen=True, slots=True)
class Measurement:
    """Figures by the names of `config.manifest.Quality`, their 95 % half widths, and what lies behind them."""

    figures: dict[str, Any]
    errors: dict[str, float]
    evidence: dict[str, Any]


def evaluate(
    variant: Path,
    base: Path,
    held_out: Sequence[dict[str, Any]],
    bits: int,
    context: RunContext,
    *,
    plan: EvaluationPlan = DEFAULT_PLAN,
    base_digest: str = "",
    evidence: Path | None = None,
) -> Quality:
    """Measure a variant against its base on token samples and judge it by its lowest bits.

    The parent's outputs are kept under `base_digest` for its other variants; without one they are not. What lies
    behind the figures is written to the file `evidence`. RecipeError for an unknown limit, CalibrationError for
    broken questions or no text, VariantError for a variant that can't be measured.
    """
    limits_for(bits, plan.limits)
    measured = measure(variant, base, held_out, context, plan=plan, base_digest=base_digest)
    if evidence:
        write_json(evidence, measured.evidence)
    return judged(measured, variant, held_out, bits, plan)


def measure(
    variant: Path,
    base: Path,
    held_out: Sequence[dict[str, Any]],
    context: RunContext,
    *,
    plan: EvaluationPlan,
    base_digest: str,
) -> Measurement:
    """Run the evaluation in a child process."""
    job = _job(variant, base, plan, base_digest, context) | {
        "samples": [_slim(sample) for sample in within(held_out, plan.tokens)],
        "prompted": [_slim(sample) for sample in held_out[: _TRIES_A_PROMPT * plan.prompts]],
    }
    with context.progress.stage("evaluation", "tokens") as advance:
        result = run_worker(
            "quantize.evaluation.evaluation_child",
            job,
            folder=context.folder,
            environ=context.environ,
            on_progress=advance,
        )
    evidence = result["evidence"] | {"loss_outliers": loss_outliers(read_modules(variant))}
    return Measurement(result["figures"], result["errors"], evidence)


def judged(
    measured: Measurement, variant: Path, held_out: Sequence[dict[str, Any]], bits: int, plan: EvaluationPlan
) -> Quality:
    """Hold the figures of a variant, and those of its quant log, against the limits of its lowest bits."""
    return judge(
        measured.figures,
        bits,
        contents_digest(sample["sha256"] for sample in within(held_out, plan.tokens)),
        plan.limits,
        errors=measured.errors,
        modules=module_figures(read_modules(variant)),
    )


def within_plan(held_out: Sequence[dict[str, Any]], plan: EvaluationPlan) -> Sequence[dict[str, Any]]:
    """Return the held-out samples that an evaluation looks at: as text to read, or for their prompts."""
    return held_out[: max(len(within(held_out, plan.tokens)), _TRIES_A_PROMPT * plan.prompts)]


def _job(variant: Path, base: Path, plan: EvaluationPlan, base_digest: str, context: RunContext) -> dict[str, Any]:
    questions = read_questions(plan.tasks) if plan.tasks else ()
    return {
        "base": str(base.resolve()),
        "variant": str(variant.resolve()),
        "base_digest": base_digest,
        "cache": str(stage_store(context.environ).root),
        "scratch": str(context.folder.resolve() / "parents"),
        "prompts": plan.prompts,
        "seeds": plan.seeds,
        "new_tokens": plan.new_tokens,
        "questions": [asdict(question) for question in questions],
        "task_tokens": plan.task_tokens,
    }


def _slim(sample: Mapping[str, Any]) -> dict[str, Any]:
    return {key: sample[key] for key in _SAMPLE_KEYS if key in sample}
