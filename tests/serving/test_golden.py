"""The golden prompt tells a variant from its parent at every distance, and never refuses one for being good."""

from math import inf, nan, sqrt

import numpy as np
import pytest

from config.golden import LONGEST_TOKENS, GoldenAnswer, distance
from serving.golden import compare

ENGINE_NATS = 0.06  # what two engines differ by
DIVERGENCES = (0.0005, 0.001, 0.003, 0.005, 0.01, 0.02, 0.043, 0.1, 0.5)
RUNS = 100


def parent_of(draw: np.random.Generator, tokens: int) -> list[float]:
    """Log-probabilities of a parent."""
    return [float(value) for value in np.log(draw.uniform(1e-6, 1.0, tokens))]


def moved(draw: np.random.Generator, answer: list[float], nats: float) -> list[float]:
    """Add noise of a root mean square in nats; what is almost certain hardly changes: d log p = (1 - p) d logit."""
    spread = (1 - np.exp(answer)) * sqrt(3)
    return [float(value) for value in np.minimum(answer + draw.normal(0, nats, len(answer)) * spread, 0.0)]


def record(variant: list[float], parent: list[float], *, exact: bool = True) -> GoldenAnswer:
    """What was recorded of a variant."""
    return GoldenAnswer(tuple(range(len(variant) + 1)), tuple(variant), tuple(parent), exact)


def rms(divergence: float) -> float:
    """Root mean square difference of log-probabilities at a KL divergence, to second order."""
    return sqrt(2 * divergence)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_weight_only_variants(divergence: float) -> None:
    """In other engines, the variant passes and its parent in its place does not; nor does another variant."""
    draw, right, wrong, other = np.random.default_rng(int(divergence * 10_000)), 0, 0, 0
    for _ in range(RUNS):
        parent = parent_of(draw, LONGEST_TOKENS - 1)
        variant, second = (moved(draw, parent, rms(divergence)) for _ in range(2))
        golden = record(variant, parent)
        right += compare(moved(draw, variant, ENGINE_NATS), golden).verdict == "same"
        wrong += compare(moved(draw, parent, ENGINE_NATS), golden).verdict != "different"
        other += compare(moved(draw, second, ENGINE_NATS), golden).verdict != "different"
    assert right >= 0.99 * RUNS
    assert wrong <= 0.01 * RUNS
    assert other <= 0.02 * RUNS


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_variants_with_rounded_activations(divergence: float) -> None:
    """Every engine rounds differently, so half of the recorded difference is seen again; no good variant is refused."""
    draw, refused, wrong = np.random.default_rng(int(divergence * 10_000)), 0, 0
    for _ in range(RUNS):
        parent = parent_of(draw, LONGEST_TOKENS - 1)
        # Weights move all engines alike, activations each on its own.
        weights = moved(draw, parent, rms(divergence / 2))
        recorded, served = (moved(draw, weights, rms(divergence / 2)) for _ in range(2))
        golden = record(recorded, parent, exact=False)
        refused += compare(moved(draw, served, ENGINE_NATS), golden).verdict == "different"
        wrong += compare(moved(draw, parent, ENGINE_NATS), golden).verdict == "same"
    assert refused <= 0.01 * RUNS
    assert wrong <= 0.01 * RUNS


@pytest.mark.parametrize("divergence", [0.001, 0.01, 0.1])
def test_a_parent_is_told_from_its_variant(divergence: float) -> None:
    """A variant in place of the parent is found, whether its activations are rounded or not."""
    draw = np.random.default_rng(9)
    for exact in (True, False):
        parent = parent_of(draw, LONGEST_TOKENS - 1)
        weights = moved(draw, parent, rms(divergence) if exact else rms(divergence / 2))
        recorded, served = (weights if exact else moved(draw, weights, rms(divergence / 2)) for _ in range(2))
        ids = tuple(range(LONGEST_TOKENS))
        golden = GoldenAnswer(ids, tuple(parent), tuple(recorded), True, exact, "its variant int4")
        assert compare(moved(draw, parent, ENGINE_NATS), golden).verdict != "different"
        assert compare(moved(draw, served, ENGINE_NATS), golden).verdict != "same"


def test_two_that_cannot_be_told_apart_are_both_served() -> None:
    """A variant that is almost its parent is served either way, and the reason says so."""
    draw = np.random.default_rng(2)
    parent = parent_of(draw, LONGEST_TOKENS - 1)
    variant = moved(draw, parent, rms(0.00001))
    for answer in (parent, variant):
        result = compare(moved(draw, answer, ENGINE_NATS), record(variant, parent))
        assert (result.verdict, "served either way" in result.reason) == ("indistinguishable", True)
    assert compare(parent, record(parent, parent)).verdict == "same"


@pytest.mark.parametrize("served,accepted", [("bf16", False), ("w8a8", True), ("int4", False)])
def test_old_records_are_read(served: str, accepted: bool) -> None:
    """Records of 127 tokens, with the distances that were measured on SmolLM2-135M: bf16, w8a8 and int4."""
    draw = np.random.default_rng(4)
    for _ in range(20):
        parent = parent_of(draw, 127)
        weights = moved(draw, parent, 0.2)
        answers = {
            "bf16": moved(draw, parent, 0.066),
            "w8a8": moved(draw, weights, 0.25),
            "int4": moved(draw, parent, 0.7),
        }
        result = compare(answers[served], record(moved(draw, weights, 0.22), parent, exact=False))
        assert (result.verdict != "different") == accepted


@pytest.mark.parametrize(
    "served,reason",
    [
        ([-1.0] * 100, "100 log-probabilities, 512 are recorded"),
        ([], "0 log-probabilities"),
        ([nan] * 512, "non-finite"),
        ([-inf] * 512, "non-finite"),
        ([-9.0] * 512, "another model, or wrong results"),
    ],
)
def test_what_is_no_answer_of_the_model(served: list[float], reason: str) -> None:
    """Wrong lengths, non-finite values and nonsense are refused, with and without a record of another model."""
    draw = np.random.default_rng(3)
    parent = parent_of(draw, 512)
    for golden in (record(moved(draw, parent, 0.3), parent), record(parent, [])):
        result = compare(served, golden)
        assert result.verdict == "different"
        assert reason in result.reason


def test_a_short_context_shortens_the_prompt() -> None:
    """What a replica has room for is asked, with one token to generate."""
    golden = record([-1.0] * 512, [-2.0] * 512)
    assert golden.shortened(None) == golden == golden.shortened(514)
    short = golden.shortened(256)
    assert (len(short.ids), len(short.logprobs), len(short.alternative)) == (255, 254, 254)


def test_distance() -> None:
    """It is symmetric, 0 for the same, and infinite where nothing can be compared."""
    assert distance([-1.0, -2.0], [-1.0, -2.0]) == 0
    assert distance([-1.0, -2.0], [-1.3, -2.3]) == pytest.approx(0.3) == distance([-1.3, -2.3], [-1.0, -2.0])
    assert distance([], []) == inf
