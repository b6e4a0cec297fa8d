"""Completions of parent and variant -> their part of the measurements, whatever generated them."""

from collections.abc import Sequence
from typing import Any

from quantize.calibration.thinking import markers_of
from quantize.evaluation.artefacts import pair_artefacts
from quantize.evaluation.inputs import EvalInputs, completion_outcome, text_of
from quantize.evaluation.paired_completions import pair_metrics
from quantize.evaluation.sampling import Completion
from quantize.evaluation.tasks import dataset_digest, is_right, question_from


def completion_measurements(
    ours: Sequence[Completion], theirs: Sequence[Completion], inputs: EvalInputs, tokenizer: Any
) -> dict[str, dict[str, Any]]:
    """Give how parent and variant completed the same prompts."""
    requests = inputs.prompts.requests
    parent, variant = (
        [completion_outcome(one, request, tokenizer) for one, request in zip(completions, requests, strict=True)]
        for completions in (ours, theirs)
    )
    pairs = [pair.model_dump() for pair in pair_metrics(requests, parent, variant)]
    return {
        "measurements": {"new_tokens": inputs.prompts.sampling.new_tokens, "completions": pairs},
        "evidence": {"generations": pair_artefacts(requests, parent, variant, tokenizer)},
    }


def task_measurements(
    ours: Sequence[Completion], theirs: Sequence[Completion], questions: Sequence[dict[str, Any]], tokenizer: Any
) -> dict[str, dict[str, Any]]:
    """Give which questions parent and variant answer correctly."""
    asked, markers = [question_from(row) for row in questions], markers_of(tokenizer)
    parent, variant = (
        [
            is_right(text_of(completion.ids, tokenizer), question.answer, markers)
            for completion, question in zip(said, asked, strict=True)
        ]
        for said in (ours, theirs)
    )
    tasks = {"dataset_sha256": dataset_digest(asked), "parent": parent, "variant": variant}
    return {"measurements": {"tasks": tasks}, "evidence": {}}
