"""Hold a variant against its base on held-out samples: run the measuring child, judge what it found."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from config.load import home_directory
from config.manifest import Quality
from quantize.calibration.datasets import contents_digest
from quantize.calibration.samples import within
from quantize.evaluation.module_checks import loss_outliers, module_figures, read_modules
from quantize.evaluation.tasks import read_questions
from quantize.evaluation.verdict import judge, limits_for
from quantize.running.context import RunContext
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

    What the parent says is kept under `base_digest` for its other variants; without one it is forgotten. What lies
    behind the figures is written to the file `evidence`. RecipeError for an unknown limit, CalibrationError for
    broken questions or no text, VariantError for a variant that can't be measured.
    """
    limits_for(bits, plan.limits)
    samples = within(held_out, plan.tokens)
    job = _job(variant, base, plan, base_digest, context) | {
        "samples": [_slim(sample) for sample in samples],
        "prompted": [_slim(sample) for sample in held_out[: _TRIES_A_PROMPT * plan.prompts]],
    }
    with context.progress.stage("evaluate", "tokens") as advance:
        result = run_worker(
            "quantize.evaluation.evaluation_child",
            job,
            folder=context.folder,
            environ=context.environ,
            on_progress=advance,
        )
    modules = read_modules(variant)
    if evidence:
        write_json(evidence, result["evidence"] | {"loss_outliers": loss_outliers(modules)})
    return judge(
        result["figures"],
        bits,
        contents_digest(sample["sha256"] for sample in samples),
        plan.limits,
        errors=result["errors"],
        modules=module_figures(modules),
    )


def _job(variant: Path, base: Path, plan: EvaluationPlan, base_digest: str, context: RunContext) -> dict[str, Any]:
    questions = read_questions(plan.tasks) if plan.tasks else ()
    return {
        "base": str(base.resolve()),
        "variant": str(variant.resolve()),
        "base_digest": base_digest,
        "cache": str(home_directory(context.environ) / "parents"),
        "scratch": str(context.folder.resolve() / "parents"),
        "prompts": plan.prompts,
        "seeds": plan.seeds,
        "new_tokens": plan.new_tokens,
        "questions": [asdict(question) for question in questions],
        "task_tokens": plan.task_tokens,
    }


def _slim(sample: Mapping[str, Any]) -> dict[str, Any]:
    return {key: sample[key] for key in _SAMPLE_KEYS if key in sample}
