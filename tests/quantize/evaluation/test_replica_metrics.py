"""KL from the likeliest tokens alone: a lower bound that grows with k, and exact where nothing is lumped."""

import math
import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantize.evaluation.top_k_metrics import (
    Prediction,
    SampleScores,
    sample_distances,
    token_distance,
)

# No probability below the 1e-6 to which a rest is known.
LOGITS = st.lists(st.floats(-4, 4), min_size=12, max_size=12)


def log_softmax(logits: list[float]) -> list[float]:
    """Log-probabilities of all tokens."""
    total = math.log(math.fsum(map(math.exp, logits)))
    return [logit - total for logit in logits]


def prediction(logprobs: list[float], top: int, came: int) -> Prediction:
    """What a server names of a distribution."""
    ordered = sorted(range(len(logprobs)), key=lambda token: -logprobs[token])
    return Prediction({token: logprobs[token] for token in {came, *ordered[:top]}}, ordered[0], came)


def full_divergence(parent: list[float], variant: list[float]) -> float:
    """KL over the whole vocabulary."""
    return math.fsum(math.exp(p) * (p - q) for p, q in zip(parent, variant, strict=True))


@given(LOGITS, LOGITS, st.integers(0, 11))
def test_a_lower_bound_that_grows_with_k(parent: list[float], variant: list[float], came: int) -> None:
    """More tokens never lower the bound, which is never above the KL of the vocabulary; with all, both are that."""
    p, q = log_softmax(parent), log_softmax(variant)
    found = [token_distance(prediction(p, top, came), prediction(q, top, came)) for top in range(1, len(p) + 1)]
    whole = full_divergence(p, q)
    # The rest is known to 1e-6, of which a divergence may have some hundredths.
    tolerance = 2e-5 * max(1.0, whole)
    assert all(after.lower_bound >= before.lower_bound - tolerance for before, after in pairwise(found))
    assert all(one.divergence >= one.lower_bound for one in found)
    assert found[-1].lower_bound == pytest.approx(whole, abs=tolerance)
    assert found[-1].divergence == pytest.approx(whole, abs=tolerance)


@given(st.integers(0, 10_000))
def test_the_estimate_is_nearer_than_the_bound(seed: int) -> None:
    """Of 40 positions of a vocabulary of 200, with equal noise on all logits, the rest is as far apart as the named."""
    draw = random.Random(seed)
    whole = bound = estimate = 0.0
    for _ in range(40):
        logits = [2.5 * draw.gauss(0, 1) for _ in range(200)]
        p, q = log_softmax(logits), log_softmax([logit + 0.2 * draw.gauss(0, 1) for logit in logits])
        found = token_distance(prediction(p, 20, 0), prediction(q, 20, 0))
        whole, bound, estimate = (whole + full_divergence(p, q), bound + found.lower_bound, estimate + found.divergence)
    assert abs(estimate - whole) < abs(bound - whole)
    assert estimate == pytest.approx(whole, rel=0.2)


@given(LOGITS, st.integers(1, 12), st.integers(0, 11))
def test_a_model_is_not_apart_from_itself(logits: list[float], top: int, came: int) -> None:
    """No divergence, no excess, the same argmax."""
    one = prediction(log_softmax(logits), top, came)
    found = token_distance(one, one)
    assert (found.divergence, found.excess_nll, found.agreed) == (0.0, 0.0, True)


def test_known_distributions() -> None:
    """Two shared tokens and a rest: the sums by hand."""
    parent = Prediction({0: math.log(0.5), 1: math.log(0.3)}, 0, 1)
    variant = Prediction({1: math.log(0.6), 0: math.log(0.2)}, 1, 1)
    found = token_distance(parent, variant)
    by_hand = 0.5 * math.log(0.5 / 0.2) + 0.3 * math.log(0.3 / 0.6) + 0.2 * math.log(0.2 / 0.2)
    among = 5 / 8 * math.log(5 / 8 / (2 / 8)) + 3 / 8 * math.log(3 / 8 / (6 / 8))
    assert found.lower_bound == pytest.approx(by_hand)
    assert found.divergence == pytest.approx(by_hand + 0.2 * among)
    assert found.excess_nll == pytest.approx(math.log(0.3 / 0.6))
    assert not found.agreed
    assert (found.parent_rest, found.variant_rest) == pytest.approx((0.2, 0.2))


def test_a_token_that_the_variant_rules_out() -> None:
    """VLLM says -9999 for a log-probability of minus infinity; the divergence stays finite, and large."""
    parent = Prediction({0: math.log(0.5), 1: math.log(0.5)}, 0, 0)
    variant = Prediction({0: 0.0, 1: -9999.0}, 0, 0)
    assert 1000 < token_distance(parent, variant).divergence < math.inf


def scores(rows: list[tuple[list[int], list[float]]]) -> SampleScores:
    """Scores of a sample from its positions."""
    made = SampleScores.empty(len(rows[0][0]))
    for ids, logprobs in rows:
        made.add(ids, logprobs)
    return made


def test_sums_of_a_sample() -> None:
    """Each subset has the sums of its positions, and the worst position is the one with the largest divergence."""
    half, most = math.log(0.5), math.log(0.9)
    parent = scores([([3, 3, 4], [half, half, half]), ([4, 3, 4], [half, half, half])])
    variant = scores([([3, 3, 4], [half, half, half]), ([4, 3, 4], [math.log(0.1), most, math.log(0.1)])])
    found = sample_distances(parent, variant)
    second = found.sums([False, True])
    assert (second.tokens, second.agreed) == (1, 1)
    assert second.divergence == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1), rel=1e-4)
    assert second.excess_nll == pytest.approx(math.log(0.5 / 0.1), rel=1e-6)
    assert found.sums([True, False]).divergence == pytest.approx(0.0, abs=1e-6)
    assert found.worst is not None
    assert found.worst.place == 1


def test_scores_of_other_tokens_are_refused() -> None:
    """Both servers must have been asked about the same sample."""
    one, other = scores([([3, 5], [-1.0, -0.5])]), scores([([4, 5], [-1.0, -0.5])])
    with pytest.raises(ValueError, match="token 3 and token 4 at the same position"):
        sample_distances(one, other)
