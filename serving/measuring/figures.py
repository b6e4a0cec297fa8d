"""What was seen of requests -> the figures of one level; pure.

A level has a window. It opens when every place has had its first token once, so that the crowd at the start is not
timed, and closes while all places are still taken. Requests sent in the window are timed to their first token, and
tokens that came in it are counted; what is still running at its end counts with what it gave so far.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from config.capacity import Load, Percentiles


@dataclass(frozen=True, slots=True)
class Chunk:
    """An event of a stream: its time of arrival, and the number of output tokens so far, if it is reported."""

    at_seconds: float
    tokens_so_far: int | None


@dataclass(frozen=True, slots=True)
class Arrival:
    """So many tokens that came at once."""

    at_seconds: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request: when it was sent, what came of it, and how it ended (`ended_seconds` is None if it was cut off)."""

    sent_seconds: float
    prompt_tokens: int
    arrivals: tuple[Arrival, ...] = ()
    ended_seconds: float | None = None
    failure: str | None = None

    @property
    def first_token_seconds(self) -> float | None:
        """When the first token was there."""
        return self.arrivals[0].at_seconds if self.arrivals else None


@dataclass(frozen=True, slots=True)
class Window:
    """The time in which a level is observed; a moment belongs to it from just after its start."""

    opened_seconds: float
    closed_seconds: float

    def __contains__(self, moment: float | None) -> bool:
        return moment is not None and self.opened_seconds < moment <= self.closed_seconds

    @property
    def seconds(self) -> float:
        """How long it was open."""
        return self.closed_seconds - self.opened_seconds


def arrivals(chunks: Sequence[Chunk], total_tokens: int | None) -> tuple[Arrival, ...]:
    """Turn events into tokens: by the counts that they carry, else the total spread evenly, else one each."""
    if all(chunk.tokens_so_far is not None for chunk in chunks):
        counts = [0, *(chunk.tokens_so_far or 0 for chunk in chunks)]
        steps = [after - before for before, after in pairwise(counts)]
    elif total_tokens is not None:
        steps = [
            (total_tokens * (n + 1)) // len(chunks) - (total_tokens * n) // len(chunks) for n in range(len(chunks))
        ]
    else:
        steps = [1] * len(chunks)
    return tuple(Arrival(chunk.at_seconds, step) for chunk, step in zip(chunks, steps, strict=True) if step > 0)


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The smallest value that so many percent of all don't exceed (nearest rank)."""
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


def percentiles(values: Sequence[float]) -> Percentiles | None:
    """The usual four, or None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    return Percentiles(**{f"p{percent}": percentile(ordered, percent) for percent in (50, 90, 95, 99)})


def load_figures(concurrency: int, exchanges: Sequence[Exchange], window: Window) -> Load:
    """Compute what a level gave."""
    timed = [each for each in exchanges if each.sent_seconds in window and each.first_token_seconds in window]
    waits = [each.arrivals[0].at_seconds - each.sent_seconds for each in timed]
    gaps = [gap for each in exchanges for gap in _gaps(each, window)]
    prompts = [each.prompt_tokens for each in exchanges if each.first_token_seconds in window]
    outputs = [arrival.tokens for each in exchanges for arrival in each.arrivals if arrival.at_seconds in window]
    return Load(
        concurrency=concurrency,
        seconds=max(window.seconds, 0.0),
        requests=len(timed),
        errors=sum(each.failure is not None for each in exchanges),
        prefill_tokens_per_second=_rate(sum(each.prompt_tokens for each in timed), sum(waits)),
        decode_tokens_per_second=_rate(len(gaps), sum(gaps)),
        prompt_tokens_per_second=_rate(sum(prompts), window.seconds),
        output_tokens_per_second=_rate(sum(outputs), window.seconds),
        time_to_first_token_seconds=percentiles(waits),
        inter_token_seconds=percentiles(gaps),
    )


def _gaps(exchange: Exchange, window: Window) -> Iterator[float]:
    """Time from token to token; tokens that came at once share the time since the ones before."""
    for before, after in pairwise(exchange.arrivals):
        if after.at_seconds in window:
            yield from [(after.at_seconds - before.at_seconds) / after.tokens] * after.tokens


def _rate(amount: float, seconds: float) -> float:
    return amount / seconds if seconds > 0 else 0.0
