"""Golden prompt: recorded log-probabilities that identify a model behind a server.

The evaluation of a variant writes it to `evaluation.json`, which the manifest's checksums cover: token ids of held-out
text, and the log-probability of each token after the first given the preceding ones, for the variant and its parent.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path

from pydantic import Field, ValidationError

from config.measurements import EVALUATION_FILE
from config.record import Record

# Of these log-probabilities, 512 are enough to distinguish a variant at a KL divergence of 0.0005 from its parent.
LONGEST_TOKENS = 513


class Golden(Record):
    """Token ids [T], and log-probabilities [T - 1] in nats of all tokens but the first."""

    ids: tuple[int, ...] = Field(min_length=2)
    variant: tuple[float, ...]
    parent: tuple[float, ...]

    @classmethod
    def read(cls, directory: Path) -> "Golden | None":
        """Read the golden prompt of a variant directory; None if it has none, as variants of other tools."""
        try:
            evaluation = json.loads((directory / EVALUATION_FILE).read_bytes())
            return cls.model_validate(evaluation["golden"])
        except (OSError, ValueError, LookupError, TypeError, ValidationError):
            return None


@dataclass(frozen=True, slots=True)
class GoldenAnswer:
    """Expected answer of one model: token ids [T] and the log-probabilities [T - 1] in nats of all but the first.

    `alternative` are the log-probabilities of the model that it is most easily taken for: of a variant its parent, of a
    parent a variant; empty if none is known. `exact` and `alternative_exact` are true if only weights are quantized.
    Quantized activations depend on the last bit of the engine's sums: their result is not reproducible.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    alternative: tuple[float, ...] = ()
    exact: bool = True
    alternative_exact: bool = True
    alternative_name: str = "its parent"

    def shortened(self, tokens: int | None) -> "GoldenAnswer":
        """Return the beginning that fits in a context, beside one token to generate."""
        if tokens is None or tokens > len(self.ids):
            return self
        count = max(tokens - 1, 2)
        logprobs, alternative = self.logprobs[: count - 1], self.alternative[: count - 1]
        return replace(self, ids=self.ids[:count], logprobs=logprobs, alternative=alternative)


def distance(served: Sequence[float], recorded: Sequence[float]) -> float:
    """Root mean square difference of log-probabilities, in nats; infinite if the lengths differ or are 0."""
    if len(served) != len(recorded) or not served:
        return float("inf")
    return sqrt(sum((a - b) ** 2 for a, b in zip(served, recorded, strict=True)) / len(served))
