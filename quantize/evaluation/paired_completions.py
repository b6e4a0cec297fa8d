"""Paired completions: the same prompts, seeds and noise for a parent and its variant."""

from collections.abc import Sequence
from dataclasses import dataclass

from config.measurements import CompletionMetrics, PairMetrics
from quantize.evaluation.sampling import GenerationRequest

# A run at the end counts as a loop if it is this long and says the same at least so often.
_RUN_TOKENS = 24
_RUN_REPEATS = 3


@dataclass(frozen=True, slots=True)
class CompletionOutcome:
    """One generation: its tokens without the one that ends it, whether it ended itself, and if it is still thinking."""

    ids: tuple[int, ...]
    finished: bool
    unclosed: bool


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


def pair_metrics(
    requests: Sequence[GenerationRequest], parent: Sequence[CompletionOutcome], variant: Sequence[CompletionOutcome]
) -> list[PairMetrics]:
    """Reduce paired completions to what the figures need."""
    return [
        PairMetrics(prompt=request.number, seed=request.seed, parent=_metrics(before), variant=_metrics(after))
        for request, before, after in zip(requests, parent, variant, strict=True)
    ]


def _metrics(outcome: CompletionOutcome) -> CompletionMetrics:
    return CompletionMetrics(
        tokens=len(outcome.ids),
        unfinished=not outcome.finished,
        repeating=ends_in_run(outcome.ids),
        unclosed=outcome.unclosed,
    )
