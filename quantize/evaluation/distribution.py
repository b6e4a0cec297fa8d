"""The distribution of the tokens' divergences: percentiles and a histogram, for people to look at. Pure."""

from bisect import bisect_right
from collections.abc import Iterable

_HISTOGRAM_DECADES = (-6, 2)
_BINS_PER_DECADE = 4
_PERCENTILES = (0.5, 0.9, 0.95, 0.99, 0.999)


def percentiles(values: Iterable[float]) -> dict[str, float]:
    """Return the values that so many don't exceed, and the largest."""
    ordered = sorted(values)
    shares = {f"p{100 * share:g}": ordered[int(share * (len(ordered) - 1))] for share in _PERCENTILES}
    return shares | {"max": ordered[-1]}


def histogram(values: Iterable[float]) -> dict[str, list[float] | list[int]]:
    """Count values between edges at equal ratios; the last bin also takes what lies beyond it."""
    low, high = _HISTOGRAM_DECADES
    steps = range(_BINS_PER_DECADE * low, _BINS_PER_DECADE * high + 1)
    edges = [0.0, *(float(f"{10 ** (step / _BINS_PER_DECADE):.4g}") for step in steps)]
    counts = [0] * (len(edges) - 1)
    for value in values:
        counts[bisect_right(edges, value, 1, len(edges) - 1) - 1] += 1
    return {"edges": edges, "counts": counts}
