"""A golden prompt: what a model says of a few tokens, kept with a variant so that a server can be told by it.

The evaluation of a variant writes it into `evaluation.json`, which is sealed: token ids of held-out text, and the
log-probability of each after the first, given those before it, for the variant and for its parent.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path

from pydantic import Field, ValidationError

from config.manifest import Record

EVALUATION_FILE = "evaluation.json"
LONGEST_TOKENS = 128


class Golden(Record):
    """Token ids [T], and log-probabilities [T - 1] in nats of all but the first."""

    ids: tuple[int, ...] = Field(min_length=2)
    variant: tuple[float, ...]
    parent: tuple[float, ...]

    @classmethod
    def read(cls, directory: Path) -> "Golden | None":
        """Read what a variant directory keeps; None where there is nothing, as with variants made elsewhere."""
        try:
            told = json.loads((directory / EVALUATION_FILE).read_bytes())
            return cls.model_validate(told["golden"])
        except (OSError, ValueError, LookupError, TypeError, ValidationError):
            return None


@dataclass(frozen=True, slots=True)
class GoldenAnswer:
    """What one model must say: token ids [T] and the log-probabilities [T - 1] of all but the first.

    `parent` is what its parent says, empty if it is the parent; `exact` where only weights are quantized: what
    activations are rounded to depends on the last digit of an engine's sums, so such a variant says it anew each time.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    parent: tuple[float, ...] = ()
    exact: bool = True


def distance(served: Sequence[float], recorded: Sequence[float]) -> float:
    """Root mean square of the differences between log-probabilities, in nats; infinite where the lengths differ."""
    if len(served) != len(recorded) or not served:
        return float("inf")
    return sqrt(sum((a - b) ** 2 for a, b in zip(served, recorded, strict=True)) / len(served))
