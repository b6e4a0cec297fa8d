"""Exchanges of one level -> its figures; pure.

A level has a window. It opens when every slot has had its first token, so that the ramp is not timed, and closes while
all slots are busy. Requests sent in the window are timed to their first token, and tokens that came in it are counted;
what still runs at its end counts with what it gave so far.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from config.capacity import Load, Percentiles


@dataclass(frozen=True, slots=True)
class Chunk:
    """An event of a stream: its time of arrival, and the number of output tokens so far, if it is reported."""

    at_seconds: float
    tokens_so_far: int | None


@dataclass(frozen=True, slots=True)
class Arrival:
    """Tokens that arrived together."""

    at_seconds: float
    tokens: int


@dataclass(slots=True)
class Exchange:
    """One request and its answer so far; `ended_seconds` is None while it runs, or if it was cut off."""

    sent_seconds: float
    prompt_tokens: int
    chunks: list[Chunk] = field(default_factory=list)
    total_tokens: int | None = None
    ended_seconds: float | None = None
    failure: str | None = None

    def arrivals(self) -> list[Arrival]:
        """Return tokens by arrival: by the counts of the events, else the total spread evenly, else one an event."""
        chunks, total = self.chunks, self.total_tokens
        count = len(chunks)
        if all(chunk.tokens_so_far is not None for chunk in chunks):
            sums = [chunk.tokens_so_far or 0 for chunk in chunks]
        else:
            sums = [number if total is None else total * number // count for number in range(1, count + 1)]
        steps = [after - before for before, after in pairwise([0, *sums])]
        return [Arrival(chunk.at_seconds, step) for chunk, step in zip(chunks, steps, strict=True) if step > 0]


@dataclass(frozen=True, slots=True)
class Window:
    """The time in which a level is observed, without its first moment."""

    opened_seconds: float
    closed_seconds: float

    def __contains__(self, moment: float) -> bool:
        return self.opened_seconds < moment <= self.closed_seconds

    @property
    def seconds(self) -> float:
        """How long it was open."""
        return self.closed_seconds - self.opened_seconds


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Return the smallest value that `percent` % of all do not exceed (nearest rank)."""
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


def percentiles(values: Sequence[float]) -> Percentiles | None:
    """Return the usual four percentiles, or None without values."""
    if not values:
        return None
    ordered = sorted(values)
    return Percentiles(**{f"p{percent}": percentile(ordered, percent) for percent in (50, 90, 95, 99)})


def load_figures(concurrency: int, exchanges: Sequence[Exchange], window: Window) -> Load:
    """Compute the result of a level."""
    answers = [(each, each.arrivals()) for each in exchanges]
    # With a first token in the window, sent in it or before.
    begun = [(each, seen[0].at_seconds) for each, seen in answers if seen and seen[0].at_seconds in window]
    timed = [(each, first - each.sent_seconds) for each, first in begun if each.sent_seconds in window]
    waits = [wait for _, wait in timed]
    gaps = [gap for _, seen in answers for gap in _gaps(seen, window)]
    outputs = [arrival.tokens for _, seen in answers for arrival in seen if arrival.at_seconds in window]
    return Load(
        concurrency=concurrency,
        seconds=max(window.seconds, 0.0),
        requests=len(timed),
        errors=sum(each.failure is not None for each in exchanges),
        prefill_tokens_per_second=_rate(sum(each.prompt_tokens for each, _ in timed), sum(waits)),
        decode_tokens_per_second=_rate(len(gaps), sum(gaps)),
        prompt_tokens_per_second=_rate(sum(each.prompt_tokens for each, _ in begun), window.seconds),
        output_tokens_per_second=_rate(sum(outputs), window.seconds),
        time_to_first_token_seconds=percentiles(waits),
        inter_token_seconds=percentiles(gaps),
    )


def _gaps(arrivals: Sequence[Arrival], window: Window) -> Iterator[float]:
    """Yield the time before each token; tokens that arrive together share it."""
    for before, after in pairwise(arrivals):
        if after.at_seconds in window:
            yield from [(after.at_seconds - before.at_seconds) / after.tokens] * after.tokens


def _rate(amount: float, seconds: float) -> float:
    return amount / seconds if seconds > 0 else 0.0
