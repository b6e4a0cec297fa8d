"""What an evaluation measured, chat by chat: `evaluation.json` beside a variant's weights keeps it.

Figures of a manifest are estimates from these sums. Two variants of one parent are compared through them, paired by
chat, without running a model again.
"""

import json
from pathlib import Path

from pydantic import Field, ValidationError

from config.errors import ManifestError
from config.record import Record

EVALUATION_FILE = "evaluation.json"


class TokenSums(Record):
    """Sums over predicted tokens.

    `divergence`: KL(parent || variant); `excess_nll`: the variant's negative log-likelihood minus the parent's, both in
    nats; `agreed`: tokens for which both have the same argmax.
    """

    tokens: int = 0
    divergence: float = 0.0
    excess_nll: float = 0.0
    agreed: int = 0


class ChatMetrics(Record):
    """One held-out sample, named by the digest of its row; `positions` is the number of tokens before its last one.

    `generated` are the tokens of its answers, reasoning included; of bare text all are. `prompt` are the others.
    """

    chat: str
    positions: int
    generated: TokenSums
    prompt: TokenSums = TokenSums()
    reasoning: TokenSums = TokenSums()
    answer: TokenSums = TokenSums()


class CompletionMetrics(Record):
    """How one model completed a prompt: its length in tokens without the end token, and whether it failed.

    `unfinished`: cut at the limit; `repeating`: ended in repeated tokens; `unclosed`: left reasoning open.
    """

    tokens: int
    unfinished: bool = False
    repeating: bool = False
    unclosed: bool = False


class PairMetrics(Record):
    """The completions of one prompt, by parent and variant with the same seed."""

    prompt: int
    seed: int
    parent: CompletionMetrics
    variant: CompletionMetrics


class TaskMetrics(Record):
    """Which questions were answered correctly, in the order of the file with that digest."""

    dataset_sha256: str
    parent: tuple[bool, ...]
    variant: tuple[bool, ...]


class PercentileMetrics(Record):
    """A percentile of all generated tokens' divergences in nats, with its 95 % interval."""

    value: float
    low: float
    high: float


class Measurements(Record):
    """Everything that was measured of a variant against its parent.

    `method` names what computed the probabilities. `kl_floor` is the mean divergence of the parent from itself, read
    in another way by the same engine: less than that is indistinguishable from 0. `top_k`: of each token only so many
    probabilities were seen, the others were lumped; None if all were. Completions have at most `new_tokens`.
    """

    method: str
    chats: tuple[ChatMetrics, ...] = Field(min_length=1)
    kl_p99: PercentileMetrics
    kl_floor: float | None = None
    top_k: int | None = None
    new_tokens: int | None = None
    completions: tuple[PairMetrics, ...] = ()
    tasks: TaskMetrics | None = None


def read_measurements(directory: Path) -> Measurements | None:
    """Read the measurements of a variant directory; None if it has none, as variants made before they were kept.

    ManifestError if they are invalid.
    """
    path = directory / EVALUATION_FILE
    try:
        content = json.loads(path.read_bytes())
        return Measurements.model_validate(content["measurements"]) if "measurements" in content else None
    except FileNotFoundError:
        return None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ManifestError(f"{path}: measurements.{where}: {first['msg']}; evaluate the variant again") from error
    except (OSError, ValueError, TypeError) as error:
        raise ManifestError(f"{path}: is not readable JSON: {error}; evaluate the variant again") from error
