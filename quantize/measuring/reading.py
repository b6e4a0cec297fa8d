"""A variant reads the samples that its parent has read, and is held against it token by token."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from quantize.measuring.divergence import Distances, Logits, compare, joined
from quantize.measuring.readout import Readout, read_states

_TOP_TOKENS = 5

Ids = Sequence[int]


@dataclass(frozen=True, slots=True)
class Readouts:
    """How parent and variant make logits of their states; both have the same vocabulary."""

    parent: Readout
    variant: Readout


@dataclass(frozen=True, slots=True)
class Worst:
    """Where in a sample the models are furthest apart: after token `place`, with both models' likeliest next tokens."""

    place: int
    divergence: float
    parent: list[tuple[int, float]]
    variant: list[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class Reading:
    """What reading the samples gave: the distances and the worst place of each."""

    samples: list[Distances]
    worst: list[Worst]

    @property
    def every(self) -> Distances:
        """The distances of all samples, one behind the other."""
        return joined(self.samples)


def read_samples(
    model: Any, readouts: Readouts, states: Any, samples: Sequence[Ids], advance: Callable[[int], None]
) -> Reading:
    """Read samples with a variant; `states` [tokens, width] are its parent's, of all predicted tokens in order."""
    first = 0
    reading = Reading([], [])
    for ids in samples:
        tokens = len(ids) - 1
        distances, worst = _read_sample(model, readouts, states[first : first + tokens], ids)
        reading.samples.append(distances)
        reading.worst.append(worst)
        first += tokens
        advance(tokens)
    return reading


def likeliest(logits: Logits, vocabulary: int) -> list[tuple[int, float]]:
    """The likeliest tokens of one position, with their probabilities."""
    shares, tokens = logits(0, vocabulary)[0].softmax(-1).topk(min(_TOP_TOKENS, vocabulary))
    return list(zip(tokens.tolist(), shares.tolist(), strict=True))


def _read_sample(model: Any, readouts: Readouts, states: Any, ids: Ids) -> tuple[Distances, Worst]:
    import torch  # noqa: PLC0415

    parts: list[Distances] = []
    worst: list[Worst] = []
    done = 0
    for theirs in read_states(model, readouts.variant, ids):
        last = done + theirs.shape[0]
        ours, targets = states[done:last].to(theirs.device), torch.tensor(ids[done + 1 : last + 1])
        vocabulary = readouts.variant.vocabulary(theirs)
        logits = partial(readouts.parent.logits, ours), partial(readouts.variant.logits, theirs)
        parts.append(compare(*logits, targets.to(theirs.device), vocabulary))
        worst.append(_worst(parts[-1], readouts, (ours, theirs), done, vocabulary))
        done = last
    return joined(parts), max(worst, key=lambda one: one.divergence)


def _worst(distances: Distances, readouts: Readouts, states: tuple[Any, Any], offset: int, vocabulary: int) -> Worst:
    place = int(distances.divergence.argmax())
    ours, theirs = (one[place : place + 1] for one in states)
    return Worst(
        place=offset + place,
        divergence=float(distances.divergence[place]),
        parent=likeliest(partial(readouts.parent.logits, ours), vocabulary),
        variant=likeliest(partial(readouts.variant.logits, theirs), vocabulary),
    )
