"""A fake model of known probabilities: the next token depends on the previous one alone."""

import math
import random
from itertools import pairwise
from typing import Any

SPREAD = 2.0
_NOISE_STREAM = 1_000_003


def next_logprobs(previous: int, vocabulary: int, noise: float) -> list[float]:
    """Log-probabilities of all tokens after `previous`; two fakes differ by their `noise` on the logits alone."""
    drawn, other = random.Random(previous), random.Random(previous + _NOISE_STREAM)
    logits = [SPREAD * drawn.gauss(0, 1) + noise * other.gauss(0, 1) for _ in range(vocabulary)]
    largest = max(logits)
    total = largest + math.log(math.fsum(math.exp(logit - largest) for logit in logits))
    return [logit - total for logit in logits]


def prompt_logprobs(tokens: list[int], top: int, vocabulary: int, noise: float) -> list[dict[str, Any] | None]:
    """What vLLM answers: the `top` likeliest tokens of each position by rank, and the one that came, first of all."""
    return [None, *(_position(a, b, top, vocabulary, noise) for a, b in pairwise(tokens))]


def ranked(logprobs: list[float]) -> list[int]:
    """All tokens, the likeliest first."""
    return sorted(range(len(logprobs)), key=logprobs.__getitem__, reverse=True)


def _position(previous: int, token: int, top: int, vocabulary: int, noise: float) -> dict[str, Any]:
    logprobs = next_logprobs(previous, vocabulary, noise)
    ordered = ranked(logprobs)
    entries = [(token, ordered.index(token) + 1), *((one, rank) for rank, one in enumerate(ordered[:top], 1))]
    return {str(one): {"logprob": logprobs[one], "rank": rank, "decoded_token": f"<{one}>"} for one, rank in entries}
