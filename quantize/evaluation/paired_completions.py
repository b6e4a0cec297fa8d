"""Figures of paired generations: the same prompts, seeds and noise for a parent and its variant."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

# A run at the end counts as a loop if it is this long and says the same at least so often.
_RUN_TOKENS = 24
_RUN_REPEATS = 3
_NORMAL_95 = 1.96


@dataclass(frozen=True, slots=True)
class CompletionOutcome:
    """One generation: its tokens without the one that ends it, whether it ended itself, and if it is still thinking."""

    ids: tuple[int, ...]
    finished: bool
    unclosed: bool


@dataclass(frozen=True, slots=True)
class PairedCompletions:
    """Parent's and variant's generations, pair by pair."""

    parent: Sequence[CompletionOutcome]
    variant: Sequence[CompletionOutcome]


@dataclass(frozen=True, slots=True)
class Ratio:
    """The median of length ratios with its 95 % interval, and from how many pairs it is."""

    value: float
    low: float
    high: float
    pairs: int
    truncated: bool


def ends_in_run(ids: Sequence[int]) -> bool:
    """Tell whether tokens end in a loop: the last 24 or more repeat something at least three times."""
    return any(
        run_length(ids, period) >= max(_RUN_TOKENS, _RUN_REPEATS * period)
        for period in range(1, len(ids) // _RUN_REPEATS + 1)
    )


def run_length(ids: Sequence[int], period: int) -> int:
    """Count the tokens at the end that repeat with this period."""
    place = len(ids) - period - 1
    while place >= 0 and ids[place] == ids[place + period]:
        place -= 1
    return len(ids) - place - 1


def length_ratio(pairs: PairedCompletions) -> Ratio:
    """Compare lengths pair by pair, variant over parent; above 1, the variant needs more tokens.

    A pair that neither finished says nothing, both were cut at the same length: such pairs count only where there
    are no others, and then `truncated` says so. Where one was cut, the ratio is a bound on the right side.
    """
    both = list(zip(pairs.parent, pairs.variant, strict=True))
    telling = [(ours, theirs) for ours, theirs in both if ours.finished or theirs.finished]
    ratios = sorted(max(len(theirs.ids), 1) / max(len(ours.ids), 1) for ours, theirs in telling or both)
    low, high = _median_interval(len(ratios))
    return Ratio(median(ratios), ratios[low], ratios[high], len(ratios), truncated=not telling)


def rates(pairs: PairedCompletions) -> dict[str, float]:
    """Shares of all generations, by the names of `config.manifest.Generation`."""
    kinds: dict[str, Callable[[CompletionOutcome], bool]] = {
        "unfinished": lambda one: not one.finished,
        "repeating": lambda one: ends_in_run(one.ids),
        "unclosed": lambda one: one.unclosed,
    }
    return {
        f"{side}{name}": sum(map(test, group)) / len(group)
        for name, test in kinds.items()
        for side, group in (("", pairs.variant), ("parent_", pairs.parent))
    }


def increase_errors(pairs: PairedCompletions) -> dict[str, float]:
    """95 % half widths of how much more often the variant fails than its parent, in each of the ways of `rates`."""
    both = list(zip(pairs.parent, pairs.variant, strict=True))
    unfinished = [int(not theirs.finished) - int(not ours.finished) for ours, theirs in both]
    repeating = [int(ends_in_run(theirs.ids)) - int(ends_in_run(ours.ids)) for ours, theirs in both]
    unclosed = [int(theirs.unclosed) - int(ours.unclosed) for ours, theirs in both]
    return {
        "unfinished_increase": mean_error(unfinished),
        "repeating_increase": mean_error(repeating),
        "unclosed_increase": mean_error(unclosed),
    }


def mean_error(values: Sequence[float]) -> float:
    """95 % half width of a mean; never less than what one item more or less would change."""
    count = len(values)
    mean = sum(values) / count
    variance = sum((value - mean) ** 2 for value in values) / max(count - 1, 1)
    return max(_NORMAL_95 * math.sqrt(variance / count), 1 / count)


def _median_interval(count: int) -> tuple[int, int]:
    """Indices of the sorted values between which the median lies with 95 % certainty, whatever the distribution."""
    reach = _NORMAL_95 * math.sqrt(count) / 2
    return max(0, math.floor((count - 1) / 2 - reach)), min(count - 1, math.ceil((count - 1) / 2 + reach))
