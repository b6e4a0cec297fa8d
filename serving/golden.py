"""Decide which model a replica serves: the recorded one, or the nearest alternative.

A replica computes the log-probability of each token of the golden prompt. Its answer s [T] is placed on the line from
the record of the alternative a (for a variant its parent) to the own record v:

    position = sum((v - a) (s - a)) / sum((v - a)^2)        0: the alternative, 1: the recorded model
    noise    = rms(s - a - position (v - a))                what engines differ by, in nats
    error    = sqrt(sum((v - a)^2 noise_t^2)) / sum((v - a)^2)

This is the paired likelihood-ratio test of two models under Gaussian noise, whose size it takes from the same answer;
the error allows for noise that is larger where the models differ more. Record and alternative are `separable` if the
error is small against the distance of the threshold from both ends. With 512 tokens and noise of 0.06 nats a variant at
a KL divergence of 0.0005 from its parent is separable; below about 0.0002 it is not, and is served either way.

Measured on SmolLM2-135M, recorded by transformers and served by vLLM 0.32 on a CPU, 127 tokens: two engines differ by
0.05 to 0.07 nats where only weights are rounded (position 0.0 or 1.0). A variant whose activations are rounded gives
another answer in every engine: w8a8 was at position 0.5 with 0.33 nats of noise, as far from its own record as from
its parent's. NOISE_NATS is a guess from these figures of one model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, sqrt
from typing import Literal

from config.golden import GoldenAnswer, distance

# More than this is another model, or an engine that computes wrongly.
NOISE_NATS = 0.25
# Engines never agree better than this; an answer that does not differ at all must not give an error of 0.
LEAST_NOISE_NATS = 0.01
# Measured: 1.1 times the distance between record and parent's.
ROUNDING_FACTOR = 1.5
# How many errors lie between the threshold and each end: each kind of mistake in one of 740 cases.
SEPARATION = 3.0


@dataclass(frozen=True, slots=True)
class GoldenResult:
    """`same`: the recorded model; `indistinguishable`: it or the alternative; `different`: `reason` says why."""

    verdict: Literal["same", "indistinguishable", "different"]
    reason: str = ""


def compare(served: Sequence[float], golden: GoldenAnswer) -> GoldenResult:
    """Decide which model has given an answer: log-probabilities of all tokens of the golden prompt but the first."""
    if len(served) != len(golden.logprobs) or not served:
        return GoldenResult("different", f"{len(served)} log-probabilities, {len(golden.logprobs)} are recorded")
    if not all(map(isfinite, served)):
        return GoldenResult("different", "non-finite log-probabilities")
    apart = distance(golden.logprobs, golden.alternative) if golden.alternative else 0.0
    if not apart:
        return _by_noise_alone(served, golden)
    line = [own - other for own, other in zip(golden.logprobs, golden.alternative, strict=True)]
    seen = [value - other for value, other in zip(served, golden.alternative, strict=True)]
    squares = sum(step * step for step in line)
    position = sum(step * value for step, value in zip(line, seen, strict=True)) / squares
    rest = [value - position * step for step, value in zip(line, seen, strict=True)]
    noise = sqrt(sum(value * value for value in rest) / len(rest))
    limit = _noise_limit(apart, golden)
    if noise > limit:
        return GoldenResult("different", _too_noisy(noise, limit))
    weighted = sqrt(sum((step * value) ** 2 for step, value in zip(line, rest, strict=True))) / squares
    return _by_position(position, max(weighted, LEAST_NOISE_NATS / sqrt(squares)), golden)


def _by_position(position: float, error: float, golden: GoldenAnswer) -> GoldenResult:
    threshold = _threshold(golden)
    if min(threshold, 1 - threshold) < SEPARATION * error:
        return GoldenResult(
            "indistinguishable", f"it cannot be distinguished from {golden.alternative_name}; served either way"
        )
    if position < threshold:
        where = f"position {position:.2f}, 0 is {golden.alternative_name} and 1 the record, at least {threshold:g}"
        return GoldenResult("different", f"nearer to {golden.alternative_name} than to its own record ({where})")
    return GoldenResult("same")


def _by_noise_alone(served: Sequence[float], golden: GoldenAnswer) -> GoldenResult:
    noise = distance(served, golden.logprobs)
    return GoldenResult("different", _too_noisy(noise, NOISE_NATS)) if noise > NOISE_NATS else GoldenResult("same")


def _threshold(golden: GoldenAnswer) -> float:
    """The position that divides both models; one with rounded activations lies anywhere from 1/2 to its own end."""
    if golden.exact == golden.alternative_exact:
        return 0.5
    return 0.75 if golden.exact else 0.25


def _noise_limit(apart: float, golden: GoldenAnswer) -> float:
    """An engine that rounds activations in its own way is beside the line by no more than the length of the line."""
    exact = golden.exact and golden.alternative_exact
    return NOISE_NATS if exact else max(NOISE_NATS, ROUNDING_FACTOR * apart)


def _too_noisy(noise: float, limit: float) -> str:
    return f"{noise:.3f} nats from its record, at most {limit:.3f}: another model, or wrong results of the engine"
