"""The parent's side of an evaluation through replicas: from its server, or from the store of an earlier evaluation.

What a server said is kept in `$QUANTGATE_HOME/stages` under the digest of the base and the questions, so that the next
variant of this base can be measured without serving the parent again.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

from quantize.errors import ReplicaError
from quantize.evaluation.inputs import EvalInputs, GenerationTask
from quantize.evaluation.replica_scores import ReplicaScorer
from quantize.evaluation.request_window import gather_all
from quantize.evaluation.sampling import Completion
from quantize.evaluation.top_k_metrics import SampleScores, sample_distances
from quantize.running.stage_store import StageKey, StageResult, StageStore, stage_key

_SCORES_FILE = "scores.bin"
# Raise this when scores of older versions would be read wrongly.
_REVISION = 1
# Samples that are scored again, side by side, and how much of each.
_FLOOR_SAMPLES = 4
_FLOOR_TOKENS = 256


@dataclass(frozen=True, slots=True)
class ParentStore:
    """Where the parent's side is kept: by the digest of the base, the samples and the prompts."""

    store: StageStore
    base_digest: str

    def scores_key(self, samples: Sequence[Sequence[int]]) -> StageKey:
        """Return the key of the scores of these samples."""
        return stage_key("replica-scores", revision=_REVISION, base=self.base_digest, samples=samples)

    def completions_key(self, task: GenerationTask) -> StageKey:
        """Return the key of the completions of these prompts."""
        requests = [asdict(request) for request in task.requests]
        sampling = asdict(task.sampling)
        return stage_key(
            "replica-completions", revision=_REVISION, base=self.base_digest, requests=requests, sampling=sampling
        )

    def require(self, key: StageKey, what: str) -> StageResult:
        """Look an entry up; ReplicaError if the parent was never asked."""
        found = self.store.find(key)
        if found is None:
            raise ReplicaError(
                f"the parent's {what} are not known from an earlier evaluation of the same samples; "
                "pass --parent-replica URL of a vLLM server that serves the base"
            )
        return found


class ServedParent:
    """The parent's server, and a file that takes what it says."""

    def __init__(self, scorer: ReplicaScorer, engine: str, inputs: EvalInputs, top_k: int, file: BinaryIO) -> None:
        self.engine, self.top_k = engine, top_k
        self._scorer, self._inputs, self._file = scorer, inputs, file
        self._first: list[SampleScores] = []
        self._kl_floor: float | None = None

    async def score(self, number: int) -> SampleScores:
        """Score one sample, and keep it; called once for each, in order."""
        scores = await self._scorer.score(self._inputs.samples[number], self.top_k)
        if len(self._first) < _FLOOR_SAMPLES:
            self._first.append(scores.head(_FLOOR_TOKENS))
        write_scores(self._file, scores)
        return scores

    async def kl_floor(self) -> float:
        """Score the first samples again, side by side instead of alone: the mean divergence from themselves."""
        cut = [self._inputs.samples[number][: _FLOOR_TOKENS + 1] for number in range(len(self._first))]
        again = await gather_all([self._scorer.score(ids, self.top_k) for ids in cut])
        distances = [sample_distances(first, second) for first, second in zip(self._first, again, strict=True)]
        self._kl_floor = sum(sum(one.divergence) for one in distances) / sum(map(len, distances))
        return self._kl_floor

    def facts(self) -> dict[str, Any]:
        """Give what is kept beside the file."""
        lengths = [len(ids) - 1 for ids in self._inputs.samples]
        return {"engine": self.engine, "top_k": self.top_k, "lengths": lengths, "kl_floor": self._kl_floor}


class StoredParent:
    """What the parent's server said in an earlier evaluation of the same samples."""

    def __init__(self, entry: StageResult, file: BinaryIO) -> None:
        self.engine: str = entry.facts["engine"]
        self.top_k: int = entry.facts["top_k"]
        self._facts, self._file = entry.facts, file

    async def score(self, number: int) -> SampleScores:
        """Read one sample's scores; called once for each, in order."""
        return read_stored(self._file, self._facts["lengths"][number], self.top_k + 1)

    async def kl_floor(self) -> float | None:
        """Give the divergence of the parent from itself in that evaluation."""
        floor: float | None = self._facts["kl_floor"]
        return floor


@contextmanager
def served_parent(
    store: StageStore, key: StageKey, scorer: ReplicaScorer, engine: str, inputs: EvalInputs, top_k: int
) -> Iterator[ServedParent]:
    """Lend the parent's server; what it says is kept if the body succeeds."""
    with store.staging(key) as staged:
        with (staged / _SCORES_FILE).open("wb") as file:
            parent = ServedParent(scorer, engine, inputs, top_k, file)
            yield parent
        store.keep(key, staged, parent.facts())


@contextmanager
def stored_parent(entry: StageResult) -> Iterator[StoredParent]:
    """Lend what the parent said in an earlier evaluation."""
    with (entry.directory / _SCORES_FILE).open("rb") as file:
        yield StoredParent(entry, file)


def keep_completions(store: StageStore, key: StageKey, completions: Sequence[Completion], engine: str) -> None:
    """Keep the parent's completions."""
    payload = [[list(one.ids), one.finished] for one in completions]
    with store.staging(key) as staged:
        store.keep(key, staged, {"completions": payload, "engine": engine})


def stored_completions(entry: StageResult) -> list[Completion]:
    """Read the parent's completions of an earlier evaluation."""
    return [Completion(tuple(ids), finished) for ids, finished in entry.facts["completions"]]


def write_scores(file: BinaryIO, scores: SampleScores) -> None:
    """Append a sample's scores to a file."""
    scores.ids.tofile(file)
    scores.logprobs.tofile(file)


def read_stored(file: BinaryIO, positions: int, width: int) -> SampleScores:
    """Read a sample's scores: `positions` of `width` entries."""
    scores = SampleScores.empty(width)
    scores.ids.fromfile(file, positions * width)
    scores.logprobs.fromfile(file, positions * width)
    return scores
