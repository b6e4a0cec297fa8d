"""Two variants of one parent, paired by chat."""

import random

import pytest

from config.measurements import ChatMetrics, Measurements, PercentileMetrics, TokenSums
from config.paired_comparison import compare_paired

TOKENS = 100


def measured(divergences: list[float], agreed: list[int] | None = None) -> Measurements:
    """Measurements of chats with these mean divergences."""
    chats = tuple(
        ChatMetrics(
            chat=str(number),
            positions=TOKENS,
            generated=TokenSums(tokens=TOKENS, divergence=kl * TOKENS, agreed=agreed[number] if agreed else 90),
        )
        for number, kl in enumerate(divergences)
    )
    return Measurements(method="test", chats=chats, kl_p99=PercentileMetrics(value=0, low=0, high=0))


def test_a_small_difference_shows_through_chats_that_differ_more() -> None:
    """Chats differ tenfold, the variants by a tenth: only pairs show it, on either side."""
    draw = random.Random(3)
    hard = [0.05 * draw.lognormvariate(0, 0.8) for _ in range(64)]
    left, right = measured(hard), measured([kl * draw.uniform(1.0, 1.2) for kl in hard])
    found = compare_paired(left, right)
    assert found is not None
    assert (found.chats, found.tokens) == (64, 64 * TOKENS)
    kl = found.differences[0]
    assert (kl.figure, kl.better) == ("kl_mean", "left")
    assert kl.p_value < 0.01
    turned = compare_paired(right, left)
    assert turned is not None
    assert turned.differences[0].better == "right"


def test_equal_variants_are_not_told_apart() -> None:
    """At most a few of a hundred pairs of equally good variants are called different."""
    called = 0
    for seed in range(100):
        draw = random.Random(seed)
        hard = [0.05 * draw.lognormvariate(0, 0.8) for _ in range(64)]
        found = compare_paired(*(measured([kl * draw.uniform(0.8, 1.2) for kl in hard]) for _ in range(2)))
        assert found is not None
        called += found.differences[0].better != "not shown"
    assert called <= 11


def test_agreement_counts_the_other_way() -> None:
    """More equal first choices are better."""
    found = compare_paired(measured([0.1] * 30, [90] * 30), measured([0.1] * 30, [92, 91, 93] * 10))
    assert found is not None
    assert {row.figure: row.better for row in found.differences}["top1_agreement"] == "right"


@pytest.mark.parametrize("others", [[], [0.1]])
def test_chats_that_only_one_has_are_left_out(others: list[float]) -> None:
    """Without two common chats there is no comparison; a chat that was cut elsewhere is another one."""
    right = measured([0.1, *others])
    found = compare_paired(measured([0.1] * 30), right)
    assert (found is None) == (not others)
    cut = right.chats[0].model_copy(update={"generated": TokenSums(tokens=3, divergence=0.1)})
    assert compare_paired(measured([0.1] * 30), right.model_copy(update={"chats": (cut,)})) is None
