"""Completions of parent and variant -> their part of the measurements, whoever generated them."""

from collections.abc import Sequence
from typing import Any

from config.measurements import CompletionMetrics, PairMetrics
from quantize.calibration.thinking import markers_of
from quantize.evaluation.inputs import EvalInputs, completion_outcome, text_of
from quantize.evaluation.paired_completions import CompletionOutcome, ends_in_run
from quantize.evaluation.sampling import Completion, GenerationRequest
from quantize.evaluation.tasks import dataset_digest, is_right, question_from

_SHOWN_PAIRS = 6


def completion_measurements(
    ours: Sequence[Completion], theirs: Sequence[Completion], inputs: EvalInputs, tokenizer: Any
) -> dict[str, dict[str, Any]]:
    """Give how parent and variant completed the same prompts."""
    requests = inputs.prompts.requests
    parent, variant = (
        [completion_outcome(one, request, tokenizer) for one, request in zip(completions, requests, strict=True)]
        for completions in (ours, theirs)
    )
    rows = list(zip(requests, parent, variant, strict=True))
    pairs = [
        PairMetrics(prompt=request.number, seed=request.seed, parent=_metrics(before), variant=_metrics(after))
        for request, before, after in rows
    ]
    return {
        "measurements": {
            "new_tokens": inputs.prompts.sampling.new_tokens,
            "completions": [pair.model_dump() for pair in pairs],
        },
        "evidence": {"generations": [_shown(*row, tokenizer) for row in rows[:_SHOWN_PAIRS]]},
    }


def task_measurements(
    ours: Sequence[Completion], theirs: Sequence[Completion], questions: Sequence[dict[str, Any]], tokenizer: Any
) -> dict[str, dict[str, Any]]:
    """Give which questions parent and variant answer correctly."""
    asked, markers = [question_from(payload) for payload in questions], markers_of(tokenizer)
    parent, variant = (
        [
            is_right(text_of(completion.ids, tokenizer), question.answer, markers)
            for completion, question in zip(completions, asked, strict=True)
        ]
        for completions in (ours, theirs)
    )
    tasks = {"dataset_sha256": dataset_digest(asked), "parent": parent, "variant": variant}
    return {"measurements": {"tasks": tasks}, "evidence": {}}


def _metrics(outcome: CompletionOutcome) -> CompletionMetrics:
    return CompletionMetrics(
        tokens=len(outcome.ids),
        unfinished=not outcome.finished,
        repeating=ends_in_run(outcome.ids),
        unclosed=outcome.unclosed,
    )


def _shown(
    request: GenerationRequest, before: CompletionOutcome, after: CompletionOutcome, tokenizer: Any
) -> dict[str, Any]:
    return {
        "prompt": text_of(request.ids, tokenizer),
        "seed": request.seed,
        "parent": text_of(before.ids, tokenizer),
        "variant": text_of(after.ids, tokenizer),
        "parent_tokens": len(before.ids),
        "variant_tokens": len(after.ids),
        "parent_finished": before.finished,
        "variant_finished": after.finished,
        "parent_repeating": ends_in_run(before.ids),
        "variant_repeating": ends_in_run(after.ids),
    }
