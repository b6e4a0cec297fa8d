"""Hold a variant against its base on held-out samples: run the measuring child, judge what it found."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from config.measurements import Measurements
from config.quality import Quality
from quantize.calibration.datasets import contents_digest
from quantize.calibration.samples import within
from quantize.evaluation.module_checks import loss_outliers, module_figures, read_modules
from quantize.evaluation.tasks import read_questions
from quantize.evaluation.verdict import judge, limits_for
from quantize.running.context import RunContext
from quantize.running.stage_store import stage_store
from quantize.running.worker import run_worker
from quantize.variants.checkpoint import write_json

# Of a chat that replicas score: what a vLLM server on a CPU reads in one step. Longer ones may need more memory than a
# server has, since its memory profile does not see the logits of a prompt.
REPLICA_SAMPLE_TOKENS = 2048
_SAMPLE_KEYS = ("ids", "sha256", "reasoning", "answer", "is_text")
# Some held-out rows have no prompt, some the same one: so many are looked at for each that is wanted.
_TRIES_A_PROMPT = 4


@dataclass(frozen=True, slots=True)
class EvaluationPlan:
    """How much an evaluation measures, and which limits differ from those of the variant's precision.

    `chats` held-out samples are read, or fewer where they have more than `tokens` tokens together; `prompts` of the
    held-out chats (0: none) are completed with each of `seeds` seeds in at most `new_tokens`; `tasks` is a JSONL file
    of questions, answered in at most `task_tokens` each.

    `replica` is the URL of a vLLM server of the variant, through which it is measured, and `parent_replica` that of its
    parent; without the latter, the parent's answers of an earlier evaluation are used. None: transformers measures.
    """

    chats: int = 96
    tokens: int | None = None
    prompts: int = 96
    seeds: int = 1
    new_tokens: int = 512
    tasks: Path | None = None
    task_tokens: int = 512
    limits: Mapping[str, float] = field(default_factory=dict)
    replica: str | None = None
    parent_replica: str | None = None


DEFAULT_PLAN = EvaluationPlan()


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What was measured of a variant, and what lies behind it: the content of `evaluation.json`."""

    measured: Measurements
    evidence: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Give both as one JSON object."""
        return {**self.evidence, "measurements": self.measured.model_dump(mode="json")}


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
    broken questions or no text, VariantError for a variant that can't be measured, ReplicaError for a server.
    """
    limits_for(bits, plan.limits)
    evaluation = measure(variant, base, held_out, context, plan=plan, base_digest=base_digest)
    if evidence:
        write_json(evidence, evaluation.to_json())
    return judged(evaluation.measured, variant, held_out, bits, plan)


def measure(
    variant: Path,
    base: Path,
    held_out: Sequence[dict[str, Any]],
    context: RunContext,
    *,
    plan: EvaluationPlan,
    base_digest: str,
) -> Evaluation:
    """Run the evaluation in a child process: by transformers, or through replicas."""
    job = _job(variant, base, plan, base_digest, context) | {
        "samples": [_slim(sample) for sample in samples_of(held_out, plan)],
        "prompted": [_slim(sample) for sample in held_out[: _TRIES_A_PROMPT * plan.prompts]],
    }
    with context.progress.stage("evaluation", "tokens") as advance:
        result = run_worker(
            "quantize.evaluation.replica_evaluation" if plan.replica else "quantize.evaluation.evaluation_child",
            job,
            folder=context.folder,
            environ=context.environ,
            on_progress=advance,
            on_event=lambda event: context.progress.log(event["line"]),
        )
    evidence = result["evidence"] | {"loss_outliers": loss_outliers(read_modules(variant))}
    return Evaluation(Measurements.model_validate(result["measurements"]), evidence)


def judged(
    measured: Measurements, variant: Path, held_out: Sequence[dict[str, Any]], bits: int, plan: EvaluationPlan
) -> Quality:
    """Hold the figures of a variant, and those of its quant log, against the limits of its lowest bits."""
    return judge(
        measured,
        bits,
        contents_digest(sample["sha256"] for sample in samples_of(held_out, plan)),
        plan.limits,
        modules=module_figures(read_modules(variant)),
    )


def samples_of(held_out: Sequence[dict[str, Any]], plan: EvaluationPlan) -> Sequence[dict[str, Any]]:
    """Return the held-out samples that an evaluation reads."""
    chats = held_out[: plan.chats]
    return chats if plan.tokens is None else within(chats, plan.tokens)


def within_plan(held_out: Sequence[dict[str, Any]], plan: EvaluationPlan) -> Sequence[dict[str, Any]]:
    """Return the held-out samples that an evaluation looks at: as text to read, or for their prompts."""
    return held_out[: max(len(samples_of(held_out, plan)), _TRIES_A_PROMPT * plan.prompts)]


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
        "replica": plan.replica,
        "parent_replica": plan.parent_replica,
    }


def _slim(sample: Mapping[str, Any]) -> dict[str, Any]:
    return {key: sample[key] for key in _SAMPLE_KEYS if key in sample}
