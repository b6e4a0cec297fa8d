"""A variant reads the samples that its parent has read, and is held against it token by token."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from quantize.evaluation.lm_head import LmHead, last_hidden_states
from quantize.evaluation.token_metrics import Logits, TokenMetrics, compare, joined

_TOP_TOKENS = 5
# 512 positions of a slice of the vocabulary are 8 MB, which fits a CPU's cache.
_COMPARED_TOKENS = 512

Ids = Sequence[int]


@dataclass(frozen=True, slots=True)
class LmHeads:
    """How parent and variant make logits of their states; both have the same vocabulary."""

    parent: LmHead
    variant: LmHead


@dataclass(frozen=True, slots=True)
class WorstToken:
    """Where in a sample the models are furthest apart: after token `place`, with both models' likeliest next tokens."""

    place: int
    divergence: float
    parent: list[tuple[int, float]]
    variant: list[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class SampleMetrics:
    """What reading the samples gave: the distances and the worst place of each."""

    samples: list[TokenMetrics]
    worst: list[WorstToken]

    @property
    def every(self) -> TokenMetrics:
        """The distances of all samples, one behind the other."""
        return joined(self.samples)


def read_samples(
    model: Any, lm_heads: LmHeads, states: Any, samples: Sequence[Ids], advance: Callable[[int], None]
) -> SampleMetrics:
    """Read samples with a variant; `states` [tokens, width] are its parent's, of all predicted tokens in order."""
    first = 0
    reading = SampleMetrics([], [])
    for ids, theirs in zip(samples, last_hidden_states(model, lm_heads.variant, samples), strict=True):
        tokens = len(ids) - 1
        metrics, worst = _sample_metrics(lm_heads, (states[first : first + tokens], theirs), ids)
        reading.samples.append(metrics)
        reading.worst.append(worst)
        first += tokens
        advance(tokens)
    return reading


def likeliest(logits: Logits, vocabulary: int) -> list[tuple[int, float]]:
    """The likeliest tokens of one position, with their probabilities."""
    shares, tokens = logits(0, vocabulary)[0].softmax(-1).topk(min(_TOP_TOKENS, vocabulary))
    return list(zip(tokens.tolist(), shares.tolist(), strict=True))


def _sample_metrics(lm_heads: LmHeads, states: tuple[Any, Any], ids: Ids) -> tuple[TokenMetrics, WorstToken]:
    """Compare the states [T, H] of parent and variant at a sample's tokens, some positions at a time."""
    import torch  # noqa: PLC0415

    parts: list[TokenMetrics] = []
    worst: list[WorstToken] = []
    targets = torch.tensor(ids[1:], device=states[1].device)
    for first in range(0, len(targets), _COMPARED_TOKENS):
        part = slice(first, first + _COMPARED_TOKENS)
        ours, theirs = states[0][part].to(states[1].device), states[1][part]
        vocabulary = lm_heads.variant.vocabulary(theirs)
        logits = partial(lm_heads.parent.logits, ours), partial(lm_heads.variant.logits, theirs)
        parts.append(compare(*logits, targets[part], vocabulary))
        worst.append(_worst(parts[-1], lm_heads, (ours, theirs), first, vocabulary))
    return joined(parts), max(worst, key=lambda one: one.divergence)


def _worst(
    metrics: TokenMetrics, lm_heads: LmHeads, states: tuple[Any, Any], offset: int, vocabulary: int
) -> WorstToken:
    place = int(metrics.divergence.argmax())
    ours, theirs = (state[place : place + 1] for state in states)
    return WorstToken(
        place=offset + place,
        divergence=float(metrics.divergence[place]),
        parent=likeliest(partial(lm_heads.parent.logits, ours), vocabulary),
        variant=likeliest(partial(lm_heads.variant.logits, theirs), vocabulary),
    )
