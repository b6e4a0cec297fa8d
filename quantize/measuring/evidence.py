"""What lies behind an evaluation's figures, for people to look at: `evaluation.json` beside the weights."""

from typing import Any

from config.golden import LONGEST_TOKENS
from quantize.measuring.divergence import histogram, percentiles, standard_error
from quantize.measuring.material import Material, text_of
from quantize.measuring.pairing import Pairs, Ratio, ends_in_run
from quantize.measuring.reading import Reading, Worst

_WORST_SAMPLES = 10
_SHOWN_PAIRS = 6
_CONTEXT_TOKENS = 60
_GOLDEN_DIGITS = 4  # a server's bf16 differs in the second


def divergences_told(reading: Reading) -> dict[str, Any]:
    """Tell the distribution of divergences."""
    every = reading.every.divergence
    sums = [float(distances.divergence.sum()) for distances in reading.samples]
    counts = [len(distances.divergence) for distances in reading.samples]
    return {
        "tokens": len(every),
        "samples": len(sums),
        "kl_standard_error": standard_error(sums, counts),
        "kl_percentiles": percentiles(every),
        "kl_histogram": histogram(every),
    }


def golden_told(reading: Reading, material: Material) -> dict[str, Any]:
    """Tell what both models say of the beginning of the longest sample: `config.golden.Golden`."""
    index = max(range(len(material.samples)), key=lambda number: len(material.samples[number]))
    ids, distances = material.samples[index][:LONGEST_TOKENS], reading.samples[index]
    said = {"variant": distances.nll_variant, "parent": distances.nll_parent}
    return {"ids": list(ids)} | {
        who: [round(-value, _GOLDEN_DIGITS) for value in nll[: len(ids) - 1].tolist()] for who, nll in said.items()
    }


def worst_told(reading: Reading, material: Material, tokenizer: Any) -> list[dict[str, Any]]:
    """Tell the samples with the largest mean divergence, each at its worst token."""
    means = [float(distances.divergence.mean()) for distances in reading.samples]
    order = sorted(range(len(means)), key=lambda index: -means[index])[:_WORST_SAMPLES]
    return [_sample_told(means[index], reading.worst[index], index, material, tokenizer) for index in order]


def pairs_told(pairs: Pairs, material: Material, tokenizer: Any) -> list[dict[str, Any]]:
    """Tell the first paired generations side by side."""
    rows = zip(material.prompts.requests, pairs.parent, pairs.variant, strict=True)
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


def ratio_told(ratio: Ratio) -> dict[str, Any]:
    """Tell how sure the ratio of lengths is."""
    return {
        "value": ratio.value,
        "interval_95": [ratio.low, ratio.high],
        "pairs": ratio.pairs,
        "note": "no generation ended itself: all were cut at the same length"
        if ratio.truncated
        else "pairs in which parent or variant ended itself",
    }


def _sample_told(mean: float, worst: Worst, index: int, material: Material, tokenizer: Any) -> dict[str, Any]:
    ids = material.samples[index]
    before = ids[max(0, worst.place + 1 - _CONTEXT_TOKENS) : worst.place + 1]
    return {
        "where": material.names[index],
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
