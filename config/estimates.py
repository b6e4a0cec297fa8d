"""Means over tokens with 95 % intervals, where chats are the independent units and not their tokens.

Tokens of one chat are alike: an interval that counts each of them is several times too narrow. All intervals here are
clustered by chat, the standard error that of a ratio of sums.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

CONFIDENCE = 0.95
_Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
_FLIPS = 9999


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its 95 % interval, from so many independent units (chats, prompts, questions)."""

    value: float
    low: float
    high: float
    units: int


def token_mean(sums: Sequence[float], counts: Sequence[int]) -> Estimate:
    """Estimate a mean per token from each chat's sum and its number of tokens, at least one of them not 0.

    The interval corrects for skew by Hall's cubic transformation (Hall 1992, J. R. Statist. Soc. B 54, 221-228): a few
    chats have most of the divergence. Of a single chat it has no ends.
    """
    units, total = len(sums), sum(counts)
    mean = sum(sums) / total
    if units < 2:
        return Estimate(mean, -math.inf, math.inf, units)
    errors = [value - count * mean for value, count in zip(sums, counts, strict=True)]
    deviation = math.sqrt(sum(error * error for error in errors) / (units - 1))
    if not deviation:
        return Estimate(mean, mean, mean, units)
    standard_error = deviation * math.sqrt(units) / total
    skew = sum((error / deviation) ** 3 for error in errors) / units
    reach = student_quantile(units - 1)
    low = mean - _hall(reach, skew / math.sqrt(units)) * standard_error
    high = mean - _hall(-reach, skew / math.sqrt(units)) * standard_error
    return Estimate(mean, low, high, units)


def token_share(hits: Sequence[int], counts: Sequence[int]) -> Estimate:
    """Estimate the share of tokens that are hits; the interval is never narrower than that of independent tokens.

    That one is the score interval of a Poisson count: where no chat has a hit, chats don't differ, and yet the share
    is not known to be 0.
    """
    clustered, total, count = token_mean(hits, counts), sum(counts), sum(hits)
    middle, reach = count + _Z * _Z / 2, _Z * math.sqrt(count + _Z * _Z / 4)
    low = max(min(clustered.low, (middle - reach) / total), 0.0)
    high = min(max(clustered.high, (middle + reach) / total), 1.0)
    return Estimate(clustered.value, low, high, clustered.units)


def percentile(values: Sequence[Sequence[float]], share: float) -> Estimate:
    """Estimate the value that `share` of all tokens don't exceed, from each chat's values.

    The interval is Woodruff's (1952, J. Am. Statist. Assoc. 47, 635-646): that of the share below the estimate, turned
    back into values.
    """
    ordered = sorted(value for chat in values for value in chat)
    found = ordered[int(share * (len(ordered) - 1))]
    above = token_share([sum(value > found for value in chat) for chat in values], [len(chat) for chat in values])

    def at(place: float) -> float:
        return ordered[round(min(max(place, 0.0), 1.0) * (len(ordered) - 1))]

    return Estimate(
        found, min(at(share - (above.high - above.value)), found), at(share + above.value - above.low), above.units
    )


def median(values: Sequence[tuple[float, float, float]]) -> Estimate:
    """Estimate the median of positive values that are known up to (low, value, high): 0 and inf are unknown ends.

    The interval is that of order statistics, whatever the distribution; unknown values lie at its far ends, so that it
    is (0, inf) where too many are unknown. Values with two unknown ends count for the interval alone.
    """
    units = len(values)
    known = sorted(value for low, value, high in values if low > 0 or math.isfinite(high))
    middle = _middle(known or sorted(value for _, value, _ in values))
    if units < 2:
        return Estimate(middle, -math.inf, math.inf, units)
    lows, highs = sorted(low for low, _, _ in values), sorted(high for _, _, high in values)
    reach = _Z * math.sqrt(units) / 2
    first = max(0, math.floor((units - 1) / 2 - reach))
    last = min(units - 1, math.ceil((units - 1) / 2 + reach))
    return Estimate(middle, min(lows[first], middle), max(highs[last], middle), units)


def sign_flip_p(differences: Sequence[float]) -> float:
    """Two-sided p-value of "the differences are symmetric about 0", by 9999 random changes of their signs.

    The draws are the same in each call. Fisher's randomization test; exact up to the number of draws.
    """
    draw = random.Random(0)  # noqa: S311 - a statistic
    observed = abs(sum(differences))
    most = observed - 1e-12 * sum(map(abs, differences))
    extreme = sum(
        abs(sum(value if draw.random() < 0.5 else -value for value in differences)) >= most for _ in range(_FLIPS)
    )
    return (extreme + 1) / (_FLIPS + 1)


def more_units(estimate: Estimate, limit: float) -> int | None:
    """How many more units until the interval should lie on one side of a limit, if the value stays; None if never.

    Widths shrink with the square root of the units.
    """
    end = estimate.high if limit > estimate.value else estimate.low
    gap, reach = abs(limit - estimate.value), abs(end - estimate.value)
    if not gap or not math.isfinite(reach):
        return None
    return max(math.ceil(estimate.units * (reach / gap) ** 2) - estimate.units, 1)


def student_quantile(degrees: int) -> float:
    """97.5 % quantile of Student's t by the Cornish-Fisher expansion; within 1 % from 3 degrees of freedom on."""
    if degrees == 1:
        return 12.706
    if degrees == 2:
        return 4.303
    z, n = _Z, degrees
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    )


def _hall(quantile: float, skew: float) -> float:
    """Turn a quantile of the symmetric statistic into one of the skewed; `skew` is over the root of the units."""
    if abs(skew) < 1e-6:
        return quantile
    return 3 / skew * (math.cbrt(1 + skew * (quantile - skew / 6)) - 1)


def _middle(ordered: Sequence[float]) -> float:
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2
