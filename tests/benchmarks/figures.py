"""The three figures, and their sums over tokens, in plain Python."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

LogProbabilities = Mapping[int, float]


@dataclass(frozen=True, slots=True)
class TokenSample:
    """Token ids, and for each but the first whether it counts."""

    ids: list[int]
    counts: list[bool]


@dataclass(frozen=True, slots=True)
class Figures:
    """How far a variant is from its base, over so many predicted tokens."""

    tokens: int
    kl_mean: float
    top1_agreement: float
    perplexity_ratio: float


@dataclass(slots=True)
class Sums:
    """What is added up token by token: KL, agreements, and how much less likely the variant found what came."""

    tokens: int = 0
    divergence: float = 0.0
    agreed: int = 0
    surprise: float = 0.0

    def add(self, divergence: float, surprise: float, *, tokens: int, agreed: int) -> None:
        """Take in some tokens' sums."""
        self.divergence += divergence
        self.surprise += surprise
        self.tokens += tokens
        self.agreed += agreed

    def figures(self) -> Figures:
        """Divide by the tokens."""
        likelier = math.exp(self.surprise / self.tokens)
        return Figures(self.tokens, self.divergence / self.tokens, self.agreed / self.tokens, likelier)


def lumped_divergence(parent: LogProbabilities, variant: LogProbabilities) -> float:
    """KL in nats over the tokens that both sides name, all others lumped into one.

    Never more than the KL over the whole vocabulary, and equal to it where both sides name everything.
    """
    shared = parent.keys() & variant.keys()
    named = sum(math.exp(parent[token]) * (parent[token] - variant[token]) for token in shared)
    rest_parent = 1.0 - sum(math.exp(parent[token]) for token in shared)
    rest_variant = 1.0 - sum(math.exp(variant[token]) for token in shared)
    if rest_parent <= 0 or rest_variant <= 0:
        return named
    return named + rest_parent * math.log(rest_parent / rest_variant)
