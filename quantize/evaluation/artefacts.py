"""What lies behind an evaluation's figures, for people to look at: `evaluation.json` beside the weights."""

from typing import Any

from config.golden import LONGEST_TOKENS
from quantize.evaluation.inputs import EvalInputs, text_of
from quantize.evaluation.paired_completions import PairedCompletions, Ratio, ends_in_run
from quantize.evaluation.sample_metrics import SampleMetrics, WorstToken
from quantize.evaluation.token_metrics import histogram, percentiles, standard_error

_WORST_SAMPLES = 10
_SHOWN_PAIRS = 6
_CONTEXT_TOKENS = 60
_GOLDEN_DIGITS = 4  # a server's bf16 differs in the second


def divergence_artefacts(reading: SampleMetrics) -> dict[str, Any]:
    """Tell the distribution of divergences."""
    every = reading.every.divergence
    sums = [float(metrics.divergence.sum()) for metrics in reading.samples]
    counts = [len(metrics.divergence) for metrics in reading.samples]
    return {
        "tokens": len(every),
        "samples": len(sums),
        "kl_standard_error": standard_error(sums, counts),
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


def pair_artefacts(pairs: PairedCompletions, inputs: EvalInputs, tokenizer: Any) -> list[dict[str, Any]]:
    """Tell the first paired generations side by side."""
    rows = zip(inputs.prompts.requests, pairs.parent, pairs.variant, strict=True)
    return [
        {
            "prompt": text_of(request.ids, tokenizer),
            "seed": request.seed,
            "parent": text_of(ours.ids, tokenizer),
            "variant": text_of(theirs.ids, tokenizer),
            "parent_tokens": len(ours.ids),
            "variant_tokens": len(theirs.ids),
            "parent_finished": ours.finished,
            "variant_finished": theirs.finished,
            "parent_repeating": ends_in_run(ours.ids),
            "variant_repeating": ends_in_run(theirs.ids),
        }
        for request, ours, theirs in list(rows)[:_SHOWN_PAIRS]
    ]


def ratio_artefacts(ratio: Ratio) -> dict[str, Any]:
    """Tell how sure the ratio of lengths is."""
    return {
        "value": ratio.value,
        "interval_95": [ratio.low, ratio.high],
        "pairs": ratio.pairs,
        "note": "no generation ended itself: all were cut at the same length"
        if ratio.truncated
        else "pairs in which parent or variant ended itself",
    }


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
