"""What lies behind an evaluation's figures, for people to look at: `evaluation.json` beside the weights."""

from collections.abc import Sequence
from typing import Any

from config.golden import LONGEST_TOKENS
from quantize.evaluation.distribution import histogram, percentiles
from quantize.evaluation.inputs import EvalInputs, text_of
from quantize.evaluation.paired_completions import CompletionOutcome, ends_in_run
from quantize.evaluation.sample_metrics import SampleMetrics, WorstToken
from quantize.evaluation.sampling import GenerationRequest

_WORST_SAMPLES = 10
_SHOWN_PAIRS = 6
_CONTEXT_TOKENS = 60
_GOLDEN_DIGITS = 4  # a server's bf16 differs in the second


def divergence_artefacts(reading: SampleMetrics) -> dict[str, Any]:
    """Describe the distribution of the divergences of all tokens, those of prompts included."""
    every = reading.every.divergence.tolist()
    return {
        "tokens": len(every),
        "samples": len(reading.samples),
        "kl_percentiles": percentiles(every),
        "kl_histogram": histogram(every),
    }


def golden_artefacts(reading: SampleMetrics, inputs: EvalInputs) -> dict[str, Any]:
    """Tell what both models say of the beginning of the longest sample: `config.golden.Golden`."""
    index = max(range(len(inputs.samples)), key=lambda number: len(inputs.samples[number]))
    ids, metrics = inputs.samples[index][:LONGEST_TOKENS], reading.samples[index]
    said = {"variant": metrics.nll_variant, "parent": metrics.nll_parent}
    return {"ids": list(ids)} | {
        who: [round(-value, _GOLDEN_DIGITS) for value in nll[: len(ids) - 1].tolist()] for who, nll in said.items()
    }


def worst_artefacts(reading: SampleMetrics, inputs: EvalInputs, tokenizer: Any) -> list[dict[str, Any]]:
    """Tell the samples with the largest mean divergence, each at its worst token."""
    means = [float(metrics.divergence.mean()) for metrics in reading.samples]
    order = sorted(range(len(means)), key=lambda index: -means[index])[:_WORST_SAMPLES]
    return [_sample_artefacts(means[index], reading.worst[index], index, inputs, tokenizer) for index in order]


def pair_artefacts(
    requests: Sequence[GenerationRequest],
    parent: Sequence[CompletionOutcome],
    variant: Sequence[CompletionOutcome],
    tokenizer: Any,
) -> list[dict[str, Any]]:
    """Describe the first paired completions side by side."""
    rows = zip(requests, parent, variant, strict=True)
    return [
        {
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
        for request, before, after in list(rows)[:_SHOWN_PAIRS]
    ]


def _sample_artefacts(mean: float, worst: WorstToken, index: int, inputs: EvalInputs, tokenizer: Any) -> dict[str, Any]:
    ids = inputs.samples[index]
    before = ids[max(0, worst.place + 1 - _CONTEXT_TOKENS) : worst.place + 1]
    return {
        "where": inputs.names[index],
        "kl_mean": mean,
        "kl_here": worst.divergence,
        "place": worst.place + 1,
        "text": text_of(before, tokenizer),
        "next": text_of([ids[worst.place + 1]], tokenizer),
        "parent": text_of([worst.parent[0][0]], tokenizer),
        "variant": text_of([worst.variant[0][0]], tokenizer),
        "parent_top": [[text_of([token], tokenizer), share] for token, share in worst.parent],
        "variant_top": [[text_of([token], tokenizer), share] for token, share in worst.variant],
    }
