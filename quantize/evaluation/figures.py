"""Measurements of a variant -> its figures, each an estimate with its interval. Pure."""

import math
from collections import defaultdict
from collections.abc import Sequence

from config.estimates import Estimate, median, token_mean, token_share
from config.measurements import ChatMetrics, CompletionMetrics, Measurements, PairMetrics, TaskMetrics, TokenSums
from config.quality import Generation, Restricted, Tasks

# The events that a rate is of, by the names of `config.quality.Generation`.
RATES = ("unfinished", "repeating", "unclosed")
# No event in n tries: the rate is below this over n with 97.5 % confidence (upper end of Poisson's score interval).
_NO_EVENT = 3.84


def token_figures(chats: Sequence[ChatMetrics]) -> dict[str, Estimate]:
    """Estimate `kl_mean`, `top1_agreement` and `perplexity_ratio` on the generated tokens."""
    sums = [chat.generated for chat in chats if chat.generated.tokens]
    counts = [part.tokens for part in sums]
    divergence = token_mean([part.divergence for part in sums], counts)
    disagreed = token_share([part.tokens - part.agreed for part in sums], counts)
    excess = token_mean([part.excess_nll for part in sums], counts)
    return {
        "kl_mean": Estimate(divergence.value, max(divergence.low, 0.0), divergence.high, divergence.units),
        "top1_agreement": Estimate(1 - disagreed.value, 1 - disagreed.high, 1 - disagreed.low, disagreed.units),
        "perplexity_ratio": Estimate(_exp(excess.value), _exp(excess.low), _exp(excess.high), excess.units),
    }


def completion_figures(completions: Sequence[PairMetrics]) -> dict[str, Estimate]:
    """Estimate the length ratio, and how much more often the variant fails in each of the ways of RATES."""
    rates = {f"{name}_increase": increase(completions, name) for name in RATES}
    return {"length_ratio": length_ratio(completions), **rates}


def length_ratio(completions: Sequence[PairMetrics]) -> Estimate:
    """Estimate the median over prompts of the variant's length over the parent's; above 1, it needs more tokens.

    A completion that was cut is longer than it looks: of two that were cut nothing is known, of one the ratio is a
    bound. Of several seeds of a prompt the middle one counts.
    """
    return median([_middle([_ratio_range(pair) for pair in pairs]) for pairs in _by_prompt(completions)])


def increase(completions: Sequence[PairMetrics], event: str) -> Estimate:
    """Estimate by how much the rate of an event grows, among the pairs in which not both have it.

    Two that were both cut, say, don't tell which would have ended: they are no evidence that the variant ends as often.
    """
    prompts = _by_prompt(completions)
    pairs = [[(_has(pair.parent, event), _has(pair.variant, event)) for pair in group] for group in prompts]
    counts = [sum(not (before and after) for before, after in group) for group in pairs]
    if not sum(counts):
        return Estimate(0.0, -math.inf, math.inf, len(prompts))
    found = token_mean([sum(after - before for before, after in group) for group in pairs], counts)
    return _widened(found, _NO_EVENT / sum(map(bool, counts)))


def task_figures(tasks: TaskMetrics) -> dict[str, Estimate]:
    """Estimate recovery (accuracy over the parent's) and flips, by question and paired."""
    parent, items = [int(right) for right in tasks.parent], len(tasks.parent)
    flips = token_share(
        [before != after for before, after in zip(tasks.parent, tasks.variant, strict=True)], [1] * items
    )
    if not any(parent):
        return {"recovery": Estimate(1.0, -math.inf, math.inf, items), "flips": flips}
    recovery = token_mean([int(right) for right in tasks.variant], parent)
    return {"recovery": _widened(recovery, _NO_EVENT / sum(parent)), "flips": flips}


def restricted(parts: Sequence[TokenSums]) -> Restricted | None:
    """Sum up a subset of the tokens of all chats; None if there are none."""
    tokens = sum(part.tokens for part in parts)
    if not tokens:
        return None
    return Restricted(
        tokens=tokens,
        kl_mean=sum(part.divergence for part in parts) / tokens,
        top1_agreement=sum(part.agreed for part in parts) / tokens,
        perplexity_ratio=_exp(sum(part.excess_nll for part in parts) / tokens),
    )


def generation(measured: Measurements, ratio: float) -> Generation:
    """Sum up the paired completions, at least one."""
    pairs = measured.completions
    seeds = len({pair.seed for pair in pairs})
    rates = {
        f"{side}{event}": sum(_has(one, event) for one in group) / len(group)
        for event in RATES
        for side, group in (("", [pair.variant for pair in pairs]), ("parent_", [pair.parent for pair in pairs]))
    }
    new_tokens = measured.new_tokens or 0
    return Generation(prompts=len(pairs) // seeds, seeds=seeds, new_tokens=new_tokens, length_ratio=ratio, **rates)


def tasks_of(tasks: TaskMetrics) -> Tasks:
    """Sum up the answers to questions; a parent that has none right leaves nothing to recover."""
    items, before, after = len(tasks.parent), sum(tasks.parent), sum(tasks.variant)
    return Tasks(
        dataset_sha256=tasks.dataset_sha256,
        items=items,
        parent_accuracy=before / items,
        accuracy=after / items,
        recovery=after / before if before else 1.0,
        flips=sum(one != other for one, other in zip(tasks.parent, tasks.variant, strict=True)) / items,
    )


def _widened(found: Estimate, least: float) -> Estimate:
    """Give an estimate an interval that reaches at least so far on both sides."""
    low, high = min(found.low, found.value - least), max(found.high, found.value + least)
    return Estimate(found.value, low, high, found.units)


def _by_prompt(completions: Sequence[PairMetrics]) -> list[list[PairMetrics]]:
    groups: dict[int, list[PairMetrics]] = defaultdict(list)
    for pair in completions:
        groups[pair.prompt].append(pair)
    return list(groups.values())


def _ratio_range(pair: PairMetrics) -> tuple[float, float, float]:
    ratio = max(pair.variant.tokens, 1) / max(pair.parent.tokens, 1)
    return 0.0 if pair.parent.unfinished else ratio, ratio, math.inf if pair.variant.unfinished else ratio


def _middle(ranges: Sequence[tuple[float, float, float]]) -> tuple[float, float, float]:
    """Take the middle of the ends and the values, of an even number the upper one."""
    place = len(ranges) // 2
    low, value, high = (sorted(column)[place] for column in zip(*ranges, strict=True))
    return low, value, high


def _has(completion: CompletionMetrics, event: str) -> bool:
    return bool(getattr(completion, event))


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))
