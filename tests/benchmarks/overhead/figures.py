"""Figures of the benchmark and their arithmetic: no clock, no processes."""

import json
import math
import re
import statistics
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from tests.benchmarks.overhead.client import Answer
from tests.benchmarks.overhead.loads import Load

_STAMP = re.compile(rb'"content":"(\d+) "')


@dataclass(frozen=True, slots=True)
class Tally:
    """What a load came to, as whoever made it counted."""

    requests: int
    seconds: float
    p50_ms: float
    p99_ms: float
    bad: int


@dataclass(frozen=True, slots=True)
class Cost:
    """What one contender spent on one load in one round."""

    contender: str
    load: str
    chunks: int
    tally: Tally
    cpu_seconds: float
    resident_bytes: int

    @property
    def per_request_us(self) -> float:
        """CPU microseconds for a request."""
        return 1e6 * self.cpu_seconds / max(self.tally.requests, 1)

    @property
    def per_chunk_us(self) -> float | None:
        """CPU microseconds for a streamed chunk, the request's own part included; None where nothing is streamed."""
        return self.per_request_us / self.chunks if self.chunks else None

    @property
    def unit_us(self) -> float:
        """What is compared: a chunk where there are any, else a request."""
        return self.per_request_us / (self.chunks or 1)


@dataclass(frozen=True, slots=True)
class Added:
    """How much later something came than directly: percentiles' differences, and where there are pairs theirs."""

    direct_p99_ms: float
    p50_ms: float
    p99_ms: float
    mean_ms: float
    error_ms: float | None  # of the mean: standard error


def tally_of_wrk(printed: str) -> Tally:
    """Read the last line that our script for wrk prints."""
    return Tally(**json.loads(printed.strip().splitlines()[-1]))


def tally_of(answers: Sequence[Answer], load: Load, seconds: float) -> Tally:
    """Count what our own client got."""
    took = [answer.seconds * 1000 for answer in answers]
    bad = sum(not answer.good(load) for answer in answers)
    return Tally(len(answers), seconds, percentile(took, 50), percentile(took, 99), bad)


def percentile(values: Iterable[float], percent: float) -> float:
    """The smallest value that so many percent are not above (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(math.ceil(len(ordered) * percent / 100), 1) - 1]


def added(direct: Sequence[float], through: Sequence[float], *, paired: bool) -> Added:
    """Compare times in seconds; `paired`: the n-th of one belongs to the n-th of the other."""
    differences = [late - soon for soon, late in zip(direct, through, strict=True)] if paired else []
    error = statistics.stdev(differences) / len(differences) ** 0.5 * 1000 if len(differences) > 1 else None
    return Added(
        direct_p99_ms=percentile(direct, 99) * 1000,
        p50_ms=(percentile(through, 50) - percentile(direct, 50)) * 1000,
        p99_ms=(percentile(through, 99) - percentile(direct, 99)) * 1000,
        mean_ms=(statistics.fmean(through) - statistics.fmean(direct)) * 1000,
        error_ms=error,
    )


def chunk_times(answer: Answer) -> list[tuple[float, float]]:
    """When each chunk of a stream left the upstream, and when it came, in seconds of one clock."""
    ends = list(accumulate(len(piece) for _, piece in answer.pieces))
    # A chunk is there with its last byte, wherever it was cut on its way.
    return [
        (int(stamp[1]) / 1e9, answer.pieces[bisect_left(ends, stamp.end())][0])
        for stamp in _STAMP.finditer(answer.body)
    ]


def gaps(answers: Iterable[Answer]) -> list[float]:
    """Seconds between a chunk and the next one, in all streams."""
    return [later - earlier for answer in answers for (_, earlier), (_, later) in pairwise(chunk_times(answer))]


def journeys(answers: Iterable[Answer]) -> list[float]:
    """Seconds that each chunk was under way."""
    return [came_at - left_at for answer in answers for left_at, came_at in chunk_times(answer)]


def ratios(costs: Sequence[Cost], to: str) -> dict[tuple[str, str], float]:
    """What each contender spends on each load against another one, round by round; the median of the rounds."""
    compared: dict[tuple[str, str], list[float]] = {}
    base = {
        load: [cost.unit_us for cost in costs if (cost.contender, cost.load) == (to, load)] for load in _loads(costs)
    }
    for contender, load in dict.fromkeys((cost.contender, cost.load) for cost in costs):
        own = [cost.unit_us for cost in costs if (cost.contender, cost.load) == (contender, load)]
        compared[contender, load] = [mine / theirs for mine, theirs in zip(own, base[load], strict=False) if theirs]
    return {key: statistics.median(found) for key, found in compared.items() if found}


def _loads(costs: Sequence[Cost]) -> list[str]:
    return list(dict.fromkeys(cost.load for cost in costs))
