"""What lies behind the figures of two servers, for people to look at: parts of `evaluation.json`."""

import heapq
import math
from array import array
from collections.abc import Sequence
from typing import Any

from config.golden import LONGEST_TOKENS
from quantize.evaluation.distribution import histogram, percentiles
from quantize.evaluation.inputs import EvalInputs, text_of
from quantize.evaluation.top_k_metrics import Prediction, SampleDistances, WorstPosition

_WORST_SAMPLES = 10
_TOP_TOKENS = 5
_CONTEXT_TOKENS = 60
_GOLDEN_DIGITS = 4


def top_k_artefacts(distances: Sequence[SampleDistances], engine: str, parent_engine: str) -> dict[str, Any]:
    """Describe the distribution of all tokens' divergences, what of it is certain, and how much was lumped."""
    every = array("d")
    for one in distances:
        every.extend(one.divergence)
    return {
        "tokens": len(every),
        "samples": len(distances),
        "kl_percentiles": percentiles(every),
        "kl_histogram": histogram(every),
        "engines": {"parent": parent_engine, "variant": engine},
        "kl_lower_bound": math.fsum(one.lower_bound for one in distances) / len(every),
        "lumped": {
            "parent": math.fsum(one.parent_rest for one in distances) / len(every),
            "variant": math.fsum(one.variant_rest for one in distances) / len(every),
        },
    }


def golden_artefacts(ids: Sequence[int], parent: Sequence[float], variant: Sequence[float]) -> dict[str, Any]:
    """Describe what both models say of the beginning of the longest sample: `config.golden.Golden`."""
    kept = list(ids[:LONGEST_TOKENS])
    both = {"variant": variant, "parent": parent}
    return {"ids": kept} | {
        who: [round(value, _GOLDEN_DIGITS) for value in logprobs[: len(kept) - 1]] for who, logprobs in both.items()
    }


def worst_artefacts(distances: Sequence[SampleDistances], inputs: EvalInputs, tokenizer: Any) -> list[dict[str, Any]]:
    """Describe the samples with the largest mean divergence, each at its worst token."""
    means = [math.fsum(one.divergence) / len(one) for one in distances]
    order = heapq.nlargest(_WORST_SAMPLES, range(len(means)), key=lambda number: means[number])
    found = [(number, distances[number].worst) for number in order]
    return [_sample(means[number], worst, number, inputs, tokenizer) for number, worst in found if worst]


def _sample(mean: float, worst: WorstPosition, number: int, inputs: EvalInputs, tokenizer: Any) -> dict[str, Any]:
    ids, place = inputs.samples[number], worst.place + 1
    return {
        "where": inputs.names[number],
        "kl_mean": mean,
        "kl_here": worst.divergence,
        "place": place,
        "text": text_of(ids[max(0, place - _CONTEXT_TOKENS) : place], tokenizer),
        "next": text_of([ids[place]], tokenizer),
        "parent": text_of([worst.parent.first], tokenizer),
        "variant": text_of([worst.variant.first], tokenizer),
        "parent_top": _top(worst.parent, tokenizer),
        "variant_top": _top(worst.variant, tokenizer),
    }


def _top(prediction: Prediction, tokenizer: Any) -> list[list[Any]]:
    likeliest = heapq.nlargest(_TOP_TOKENS, prediction.logprobs.items(), key=lambda entry: entry[1])
    return [[text_of([token], tokenizer), math.exp(logprob)] for token, logprob in likeliest]
