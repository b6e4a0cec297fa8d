"""Sequential tests that may be looked at all the time: e-values, whose test fails a canary once E >= 1 / alpha.

An e-value is a non-negative statistic whose expectation under the null hypothesis is at most 1 at every moment, so by
Ville's inequality the probability that it ever reaches 1 / alpha is at most alpha. All values here are logarithms.

Three tests, each a value and the functions that add evidence to it:

* `EventCounts`: who had an event, the canary or the stable variant? Exact, conditional on the event: the lottery sends
  a conversation to the canary with probability w, so P(canary | event) = w r / (w r + 1 - w), r = p_canary / p_stable.
  Changing weights and a drift that both arms share do not matter. Form: Lindon and Malek, arXiv 2011.03567, with a grid
  of ratios instead of their Dirichlet prior.
* `MeanDifference`: is a mean of the canary higher? Differences within blocks of time, each weighted by its precision;
  one-sided normal mixture of Howard, Ramdas, McAuliffe and Sekhon, Ann. Stat. 49(2), 2021, arXiv 1810.08240.
* `passes_ceiling`: is the rate of an event below a ceiling? A mixture of likelihood ratios for a binomial rate.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

# Ratios canary / stable beyond the tolerance, uniformly weighted.
RATIOS = (1.1, 1.25, 1.6, 2.0, 3.0, 5.0, 9.0)
# Alternatives of `passes_ceiling`, as shares of the ceiling.
_SHARES = (0.0, 0.25, 0.5, 0.75)
_NORMAL = NormalDist()
_FAR = -20.0


@dataclass(frozen=True, slots=True)
class EventCounts:
    """Evidence that the canary has an event more often than `tolerance` times as often as the stable variant.

    `log_ratios` are log-likelihood ratios, one per ratio of `ratios`.
    """

    tolerance: float = 1.0
    ratios: tuple[float, ...] = RATIOS
    log_ratios: tuple[float, ...] = (0.0,) * len(RATIOS)

    @property
    def log_e(self) -> float:
        """The logarithm of the e-value: the mean over all ratios."""
        return log_mean_exp(self.log_ratios)


def with_events(counts: EventCounts, canary: int, stable: int, weight: float) -> EventCounts:
    """Add events of conversations that were drawn to each arm while the canary had a weight between 0 and 1.

    Count by the arm that was drawn, also if the draw then spilled or failed over. Weights 0 and 1 give no evidence.
    """
    if not 0 < weight < 1 or not canary + stable:
        return counts
    before = _canary_probability(weight, counts.tolerance)
    log_ratios = []
    for ratio, log_ratio in zip(counts.ratios, counts.log_ratios, strict=True):
        after = _canary_probability(weight, counts.tolerance * ratio)
        gained = canary * math.log(after / before) + stable * math.log((1 - after) / (1 - before))
        log_ratios.append(log_ratio + gained)
    return EventCounts(counts.tolerance, counts.ratios, tuple(log_ratios))


@dataclass(frozen=True, slots=True)
class Moments:
    """Count, mean and sum of squared deviations of some values; both arms of a block have one each."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0


def moments(values: Sequence[float]) -> Moments:
    """Summarize values."""
    if not values:
        return Moments()
    mean = math.fsum(values) / len(values)
    return Moments(len(values), mean, math.fsum([(value - mean) ** 2 for value in values]))


@dataclass(frozen=True, slots=True)
class MeanDifference:
    """Evidence that the mean of the canary exceeds that of the stable variant by more than `margin`.

    `rho` tunes the mixture to the precision at which an answer is expected (`mixture_rho`). `precision` is the sum of
    the inverse variances of the blocks' differences, `excess` and `difference` are sums weighted by them. `squares` and
    `freedom` estimate the variance of one value from earlier blocks; `canary` and `stable` count values.
    """

    margin: float
    rho: float
    precision: float = 0.0
    excess: float = 0.0
    difference: float = 0.0
    squares: float = 0.0
    freedom: int = 0
    canary: int = 0
    stable: int = 0

    @property
    def log_e(self) -> float:
        """The logarithm of the e-value."""
        return normal_mixture(self.excess, self.precision, self.rho)


# The variance of one value is estimated from as many values of each arm before any block counts.
MIN_VALUES = 30
# Of one value, a logarithm: answers that all have the same length are no exact proof of anything.
MIN_VARIANCE = 1e-4


def with_block(test: MeanDifference, canary: Moments, stable: Moments) -> MeanDifference:
    """Add a block of time; without values of both arms it only adds to the estimate of the variance."""
    ready = min(test.canary, test.stable) >= MIN_VALUES
    precision = excess = difference = 0.0
    if ready and canary.count and stable.count:
        spread = max(test.squares / max(test.freedom, 1), MIN_VARIANCE)
        variance = spread * (1 / canary.count + 1 / stable.count)
        precision = 1 / variance
        difference = (canary.mean - stable.mean) * precision
        excess = difference - test.margin * precision
    return MeanDifference(
        test.margin,
        test.rho,
        test.precision + precision,
        test.excess + excess,
        test.difference + difference,
        test.squares + canary.squares + stable.squares,
        test.freedom + max(canary.count - 1, 0) + max(stable.count - 1, 0),
        test.canary + canary.count,
        test.stable + stable.count,
    )


def interval(test: MeanDifference, alpha: float = 0.05) -> tuple[float, float, float] | None:
    """Return lower bound, estimate and upper bound of the difference, valid at every moment; None without evidence."""
    if not test.precision:
        return None
    estimate, total = test.difference / test.precision, test.precision + test.rho
    half = math.sqrt(total * math.log(total / (test.rho * alpha**2))) / test.precision
    return estimate - half, estimate, estimate + half


def normal_mixture(excess: float, precision: float, rho: float) -> float:
    """Return the log e-value of the one-sided normal mixture for a sum with a variance of `precision`."""
    total = precision + rho
    return 0.5 * math.log(4 * rho / total) + _log_scaled_probability(excess / math.sqrt(total))


@dataclass(frozen=True, slots=True)
class MeanAbove:
    """Evidence that a mean is above a budget: the same mixture, of one sample whose variance is estimated from it."""

    budget: float
    rho: float
    values: Moments = Moments()

    @property
    def log_e(self) -> float:
        """The logarithm of the e-value; 0 before there are enough values to know their variance."""
        count = self.values.count
        if count < MIN_VALUES:
            return 0.0
        variance = max(self.values.squares / (count - 1), MIN_VARIANCE)
        return normal_mixture(count * (self.values.mean - self.budget) / variance, count / variance, self.rho)


def with_value(moments: Moments, value: float) -> Moments:
    """Add one value (Welford)."""
    count = moments.count + 1
    mean = moments.mean + (value - moments.mean) / count
    return Moments(count, mean, moments.squares + (value - moments.mean) * (value - mean))


def target_precision(alpha: float, effect: float, power: float = 0.95) -> float:
    """Return the precision at which a test with one look finds an effect beyond the margin with some power."""
    return ((_NORMAL.inv_cdf(1 - alpha) + _NORMAL.inv_cdf(power)) / effect) ** 2


def mixture_rho(alpha: float, effect: float) -> float:
    """Return the `rho` with which the mixture is tightest at the target precision (Howard et al., section 3.5)."""
    log_inverse = math.log(1 / (2 * alpha))
    return target_precision(alpha, effect) / (2 * log_inverse + math.log(1 + 2 * log_inverse))


def passes_ceiling(events: int, count: int, ceiling: float) -> float:
    """Return the log e-value against "the rate is at least `ceiling`", which a test without any event passes, too."""
    if not 0 < ceiling < 1:
        return -math.inf
    return log_mean_exp([_log_likelihood_ratio(events, count, share * ceiling, ceiling) for share in _SHARES])


def log_mean_exp(logarithms: Sequence[float]) -> float:
    """Return the logarithm of the mean of exponentials."""
    largest = max(logarithms)
    if largest == -math.inf:
        return -math.inf
    return largest + math.log(math.fsum([math.exp(each - largest) for each in logarithms]) / len(logarithms))


def _log_scaled_probability(z: float) -> float:
    """Return log Phi(z) + z^2 / 2.

    Far below 0, Phi(z) underflows while z^2 grows, as for answers that all have the same length. There it is the
    asymptotic series of Mills' ratio.
    """
    if z < _FAR:
        return math.log1p(-1 / z**2 + 3 / z**4) - math.log(-z * math.sqrt(2 * math.pi))
    return z * z / 2 + math.log(0.5 * math.erfc(-z / math.sqrt(2)))


def _canary_probability(weight: float, ratio: float) -> float:
    """The probability that an event is the canary's, if it has events `ratio` times as often."""
    return weight * ratio / (weight * ratio + 1 - weight)


def _log_likelihood_ratio(events: int, count: int, rate: float, ceiling: float) -> float:
    if rate == 0 and events:
        return -math.inf
    from_events = events * math.log(rate / ceiling) if events else 0.0
    return from_events + (count - events) * math.log((1 - rate) / (1 - ceiling))
