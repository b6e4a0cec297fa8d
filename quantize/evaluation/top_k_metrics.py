"""Two models' likeliest tokens at each position -> how far apart the models are. Pure, without torch.

A server names the log-probabilities of the k likeliest tokens and of the token that came, not of the whole vocabulary.
With p of the parent, q of the variant, and the tokens that both name, the chain rule of KL splits it into

    KL = sum(p_t log(p_t / q_t)) + p_rest log(p_rest / q_rest)  over the named tokens and one rest
       + p_rest KL(p in the rest || q in the rest)

The first line is known, and a lower bound (data processing inequality). The KL inside the rest is not: that of the
named tokens among themselves stands for it. Of SmolLM2-135M, whose rest is large, this is so much of the true KL:

| k | rest | KL 0.006 (int8): bound, estimate | KL 0.16 (int4): bound, estimate |
| --- | --- | --- | --- |
| 20 | 0.19 | 0.75, 0.92 | 0.70, 0.86 |
| 128 | 0.08 | 0.91, 0.98 | 0.88, 0.95 |
| 1024 | 0.02 | 0.98, 1.00 | 0.97, 0.99 |
"""

import math
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from config.measurements import TokenSums

# Sums of float32 probabilities are known to about this; a smaller rest is indistinguishable from none.
_LEAST_MASS = 1e-6


@dataclass(frozen=True, slots=True)
class Prediction:
    """One model's view of one position: log-probabilities by token, the likeliest token, and the token that came."""

    logprobs: Mapping[int, float]
    first: int
    came: int


@dataclass(frozen=True, slots=True)
class SampleScores:
    """One model's predictions of a sample's tokens but the first, `width` entries each.

    Entry 0 of a position is the token that came, the others are the likeliest, in their order; `ids` (int32) and
    `logprobs` (float32, as servers compute them) hold positions one behind the other.
    """

    width: int
    ids: "array[int]"
    logprobs: "array[float]"

    @classmethod
    def empty(cls, width: int) -> "SampleScores":
        """Return scores of no position yet."""
        return cls(width, array("i"), array("f"))

    def __len__(self) -> int:
        """Return the number of positions."""
        return len(self.ids) // self.width

    def add(self, ids: Sequence[int], logprobs: Sequence[float]) -> None:
        """Append a position; ValueError if it has not `width` entries."""
        if len(ids) != self.width or len(logprobs) != self.width:
            raise ValueError(f"{len(ids)} log-probabilities at a position, {self.width} expected")
        self.ids.extend(ids)
        self.logprobs.extend(logprobs)

    def head(self, positions: int) -> "SampleScores":
        """Return a copy of the first positions."""
        return SampleScores(self.width, self.ids[: positions * self.width], self.logprobs[: positions * self.width])

    def came(self) -> list[float]:
        """Return the log-probabilities of the tokens that came."""
        return self.logprobs[:: self.width].tolist()

    def predictions(self) -> Iterator[Prediction]:
        """Yield the positions in their order."""
        for start in range(0, len(self.ids), self.width):
            ids = self.ids[start : start + self.width]
            logprobs = self.logprobs[start : start + self.width]
            yield Prediction(dict(zip(ids, logprobs, strict=True)), ids[min(1, self.width - 1)], ids[0])


@dataclass(frozen=True, slots=True)
class TokenDistance:
    """How far two models are apart at one position: KL(parent || variant) and nll difference in nats, equal argmax.

    `lower_bound` is the part of the KL that is known; `parent_rest` and `variant_rest` are the probabilities that were
    lumped.
    """

    divergence: float
    lower_bound: float
    excess_nll: float
    agreed: bool
    parent_rest: float
    variant_rest: float


@dataclass(frozen=True, slots=True)
class WorstPosition:
    """The position of a sample at which the models are furthest apart, and their predictions there."""

    place: int
    divergence: float
    parent: Prediction
    variant: Prediction


@dataclass(slots=True)
class SampleDistances:
    """The distances at a sample's positions, one behind the other, and sums of the bounds and of the rests."""

    divergence: "array[float]" = field(default_factory=lambda: array("d"))
    excess_nll: "array[float]" = field(default_factory=lambda: array("d"))
    agreed: bytearray = field(default_factory=bytearray)
    lower_bound: float = 0.0
    parent_rest: float = 0.0
    variant_rest: float = 0.0
    worst: WorstPosition | None = None

    def __len__(self) -> int:
        """Return the number of positions."""
        return len(self.divergence)

    def add(self, parent: Prediction, variant: Prediction) -> None:
        """Append a position."""
        distance = token_distance(parent, variant)
        if self.worst is None or distance.divergence > self.worst.divergence:
            self.worst = WorstPosition(len(self), distance.divergence, parent, variant)
        self.divergence.append(distance.divergence)
        self.excess_nll.append(distance.excess_nll)
        self.agreed.append(distance.agreed)
        self.lower_bound += distance.lower_bound
        self.parent_rest += distance.parent_rest
        self.variant_rest += distance.variant_rest

    def sums(self, marked: Iterable[bool]) -> TokenSums:
        """Sum up the positions whose mark is set."""
        places = [place for place, one in enumerate(marked) if one]
        return TokenSums(
            tokens=len(places),
            divergence=math.fsum(self.divergence[place] for place in places),
            excess_nll=math.fsum(self.excess_nll[place] for place in places),
            agreed=sum(self.agreed[place] for place in places),
        )


def token_distance(parent: Prediction, variant: Prediction) -> TokenDistance:
    """Compare two predictions of one token, of which both name at least the token that came."""
    pairs = [(parent.logprobs[token], variant.logprobs[token]) for token in parent.logprobs.keys() & variant.logprobs]
    parent_known = math.fsum(math.exp(p) for p, _ in pairs)
    variant_known = math.fsum(math.exp(q) for _, q in pairs)
    parent_rest, variant_rest = max(1 - parent_known, _LEAST_MASS), max(1 - variant_known, _LEAST_MASS)
    known = math.fsum(math.exp(p) * (p - q) for p, q in pairs)
    lower_bound = max(known + parent_rest * math.log(parent_rest / variant_rest), 0.0)
    return TokenDistance(
        divergence=lower_bound + parent_rest * _among(known, parent_known, variant_known),
        lower_bound=lower_bound,
        excess_nll=parent.logprobs[parent.came] - variant.logprobs[variant.came],
        agreed=parent.first == variant.first,
        parent_rest=parent_rest,
        variant_rest=variant_rest,
    )


def _among(known: float, parent_known: float, variant_known: float) -> float:
    """KL of the named tokens among themselves: both distributions restricted to them, and scaled to 1."""
    if not parent_known or not variant_known:
        return 0.0
    return max(known / parent_known - math.log(parent_known / variant_known), 0.0)


def sample_distances(parent: SampleScores, variant: SampleScores) -> SampleDistances:
    """Compare two models on one sample; ValueError if they predicted different tokens."""
    distances = SampleDistances()
    for ours, theirs in zip(parent.predictions(), variant.predictions(), strict=True):
        if ours.came != theirs.came:
            raise ValueError(f"token {ours.came} and token {theirs.came} at the same position")
        distances.add(ours, theirs)
    return distances
