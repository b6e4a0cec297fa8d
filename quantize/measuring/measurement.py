"""Hold a variant against its base on held-out samples: run the measuring child, judge what it found."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from config.load import home_directory
from config.manifest import Quality
from quantize.measuring.judgement import judge, limits_for
from quantize.measuring.module_checks import loss_outliers, module_figures, read_modules
from quantize.measuring.tasks import read_questions
from quantize.running.worker import run_worker
from quantize.running.workshop import Workshop
from quantize.text.calibration import contents_digest
from quantize.text.samples import within
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
    shop: Workshop,
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
    job = _job(variant, base, plan, base_digest, shop) | {
        "samples": [_slim(sample) for sample in samples],
        "prompted": [_slim(sample) for sample in held_out[: _TRIES_A_PROMPT * plan.prompts]],
    }
    with shop.stages.stage("evaluate", "tokens") as advance:
        told = run_worker(
            "quantize.measuring.evaluation", job, folder=shop.folder, environ=shop.environ, on_progress=advance
        )
    modules = read_modules(variant)
    if evidence:
        write_json(evidence, told["evidence"] | {"loss_outliers": loss_outliers(modules)})
    return judge(
        told["figures"],
        bits,
        contents_digest(sample["sha256"] for sample in samples),
        plan.limits,
        errors=told["errors"],
        modules=module_figures(modules),
    )


def _job(variant: Path, base: Path, plan: EvaluationPlan, base_digest: str, shop: Workshop) -> dict[str, Any]:
    questions = read_questions(plan.tasks) if plan.tasks else ()
    return {
        "base": str(base.resolve()),
        "variant": str(variant.resolve()),
        "base_digest": base_digest,
        "cache": str(home_directory(shop.environ) / "parents"),
        "scratch": str(shop.folder.resolve() / "parents"),
        "prompts": plan.prompts,
        "seeds": plan.seeds,
        "new_tokens": plan.new_tokens,
        "questions": [asdict(question) for question in questions],
        "task_tokens": plan.task_tokens,
    }


def _slim(sample: Mapping[str, Any]) -> dict[str, Any]:
    return {key: sample[key] for key in _SAMPLE_KEYS if key in sample}
