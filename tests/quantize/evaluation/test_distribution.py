"""Histograms and percentiles of divergences."""

from quantize.evaluation.distribution import histogram, percentiles


def test_a_histogram_counts_every_token_once() -> None:
    """Zeros, tiny ones and those beyond the last edge have their bins, too."""
    told = histogram([0.0, 1e-9, 1e-6, 0.5, 99.0, 1000.0])
    assert len(told["edges"]) == len(told["counts"]) + 1
    assert (sum(told["counts"]), told["counts"][0], told["counts"][1], told["counts"][-1]) == (6, 2, 1, 2)
    assert told["edges"] == sorted(told["edges"])


def test_percentiles_are_values_that_occur() -> None:
    """The 99th of a hundred values is the largest but one."""
    told = percentiles(range(100))
    assert (told["p50"], told["p99"], told["max"]) == (49, 98, 99)
