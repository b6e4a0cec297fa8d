"""How far a variant is from its parent, as two running vLLM servers serve them.

Runs as a child process: it needs the base's tokenizer, and neither torch nor a model. Both servers score the same token
ids, one request at a time each, and complete the same prompts. Of each sample only sums are kept, and of the parent's
scores a file (`quantize.evaluation.replica_parent`).
"""

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from config.estimates import percentile
from config.golden import Golden
from config.load import process_environment
from config.measurements import ChatMetrics
from quantize.calibration.tokenizing import load_tokenizer
from quantize.errors import CalibrationError
from quantize.evaluation.completion_measurements import completion_measurements, task_measurements
from quantize.evaluation.inputs import EvalInputs, GenerationTask, prepare
from quantize.evaluation.replica_artefacts import golden_artefacts, top_k_artefacts, worst_artefacts
from quantize.evaluation.replica_claims import require_claimed, require_not_swapped
from quantize.evaluation.replica_parent import (
    ParentStore,
    ServedParent,
    StoredParent,
    keep_completions,
    served_parent,
    stored_completions,
    stored_parent,
)
from quantize.evaluation.replica_scores import IN_FLIGHT_TOKENS, ReplicaScorer, ServedModel, scorer
from quantize.evaluation.request_window import gather_all
from quantize.evaluation.sampling import Completion
from quantize.evaluation.top_k_metrics import SampleDistances, SampleScores, sample_distances
from quantize.running.stage_store import StageStore
from quantize.running.worker import WorkerChannel, run_child

# Log-probabilities per position that are asked for; a server gives at most its --max-logprobs.
TOP_K = 1024
# Of one answer: 75 MB of JSON, and a few hundred MB of objects in the server.
_MOST_ENTRIES = 1 << 20
# More than this share of the probability lumped is worth a line.
_MUCH_LUMPED = 0.05
_API_KEY = "VLLM_API_KEY"


@dataclass(frozen=True, slots=True)
class Server:
    """A server and what it says of itself."""

    scorer: ReplicaScorer
    model: ServedModel


@dataclass(frozen=True, slots=True)
class Servers:
    """Both sides; the parent's is None where its answers of an earlier evaluation are to be used."""

    variant: Server
    parent: Server | None

    @property
    def context_tokens(self) -> int | None:
        """The tokens that both servers take, one that they generate included."""
        lengths = [one.model.max_model_len for one in (self.variant, self.parent) if one and one.model.max_model_len]
        return min(lengths, default=None)


@dataclass(slots=True)
class Progress:
    """Counts tokens, and reports them to the parent process."""

    channel: WorkerChannel
    total: int
    done: int = 0

    def __call__(self, tokens: int) -> None:
        """Count tokens that are done."""
        self.done += tokens
        self.channel.progress(self.done, self.total)

    def log(self, line: str) -> None:
        """Have a line logged."""
        self.channel.event({"line": line})


@dataclass(slots=True)
class Reading:
    """The distances of all samples, and both sides' scores of the longest one, which become the golden prompt."""

    distances: list[SampleDistances]
    longest: int = 0
    longest_scores: tuple[list[float], list[float]] = ([], [])

    def add(self, parent: SampleScores, variant: SampleScores) -> None:
        """Take in the next sample."""
        if len(parent) > len(self.longest_scores[0]):
            self.longest, self.longest_scores = len(self.distances), (parent.came(), variant.came())
        self.distances.append(sample_distances(parent, variant))


def measure(job: dict[str, Any], channel: WorkerChannel) -> dict[str, Any]:
    """Child's work: a job of `quantize.evaluation.evaluate` with two URLs -> `{measurements, evidence}`."""
    tokenizer = load_tokenizer(Path(job["base"]), chats=bool(job["questions"]))
    inputs = prepare(job, tokenizer)
    if not inputs.tokens:
        raise CalibrationError(["no held-out sample has two tokens or more; pass more text with --data"])
    return asyncio.run(_measure(job, inputs, tokenizer, channel))


async def _measure(job: dict[str, Any], given: EvalInputs, tokenizer: Any, channel: WorkerChannel) -> dict[str, Any]:
    store = ParentStore(StageStore(Path(job["cache"])), job["base_digest"])
    async with _servers(job) as servers:
        await _check_claims(servers, job)
        inputs = within_context(given, servers.context_tokens)
        progress = Progress(channel, inputs.tokens + inputs.prompts.most_tokens + inputs.questions.most_tokens)
        for line in cut_lines(given, inputs):
            progress.log(line)
        parts = [await _token_part(servers, store, inputs, tokenizer, progress)]
        if inputs.prompts.requests:
            completed = await _both_complete(servers, store, inputs.prompts, progress)
            parts.append(completion_measurements(*completed, inputs, tokenizer))
        if inputs.questions.requests:
            answered = await _both_complete(servers, store, inputs.questions, progress)
            parts.append(task_measurements(*answered, job["questions"], tokenizer))
    return {name: {key: value for part in parts for key, value in part[name].items()} for name in parts[0]}


@asynccontextmanager
async def _servers(job: dict[str, Any]) -> AsyncIterator[Servers]:
    key = process_environment().get(_API_KEY)
    async with AsyncExitStack() as stack:
        variant = await stack.enter_async_context(scorer(job["replica"], key))
        url = job["parent_replica"]
        parent = await stack.enter_async_context(scorer(url, key)) if url else None
        served = await gather_all([one.identify() for one in (variant, parent) if one])
        yield Servers(Server(variant, served[0]), Server(parent, served[1]) if parent else None)


async def _check_claims(servers: Servers, job: dict[str, Any]) -> None:
    variant, base = Path(job["variant"]), Path(job["base"])
    require_claimed(job["replica"], servers.variant.model, variant, base)
    if servers.parent is None:
        return
    require_claimed(job["parent_replica"], servers.parent.model, base, variant)
    golden = Golden.read(variant)
    if golden is None:
        return
    context = servers.context_tokens
    ids = golden.ids[: context - 1 if context else None]
    both = [servers.variant.scorer, servers.parent.scorer]
    served = await gather_all([one.score(ids, 1) for one in both])
    require_not_swapped(golden, served[0].came(), served[1].came())


async def _token_part(
    servers: Servers, store: ParentStore, inputs: EvalInputs, tokenizer: Any, progress: Progress
) -> dict[str, dict[str, Any]]:
    """Let both sides score the samples, and give the sums of each."""
    wanted = min(TOP_K, len(tokenizer), _MOST_ENTRIES // max(map(len, inputs.samples)))
    top_k = await servers.variant.scorer.most_logprobs(wanted)
    async with _parent_side(servers, store, inputs, wanted) as parent:
        reading = await _read_samples(servers.variant.scorer, parent, inputs, top_k, progress)
        kl_floor = await parent.kl_floor()
    engine, top_k = servers.variant.model.engine, min(top_k, parent.top_k)
    described = {"method": _method(engine, parent.engine), "top_k": top_k, "kl_floor": kl_floor}
    evidence = top_k_artefacts(reading.distances, engine, parent.engine)
    progress.log(lumped_line(evidence, top_k))
    evidence["worst"] = worst_artefacts(reading.distances, inputs, tokenizer)
    evidence["golden"] = golden_artefacts(inputs.samples[reading.longest], *reading.longest_scores)
    return {"measurements": described | token_measurements(reading.distances, inputs), "evidence": evidence}


@asynccontextmanager
async def _parent_side(
    servers: Servers, store: ParentStore, inputs: EvalInputs, wanted: int
) -> AsyncIterator[ServedParent | StoredParent]:
    """Lend the parent's server, or without one its answers of an earlier evaluation."""
    key = store.scores_key(inputs.samples)
    if servers.parent is None:
        with stored_parent(store.require(key, "scores")) as stored:
            yield stored
        return
    client, engine = servers.parent.scorer, servers.parent.model.engine
    top_k = await client.most_logprobs(wanted)
    with served_parent(store.store, key, client, engine, inputs, top_k) as served:
        yield served


async def _read_samples(
    variant: ReplicaScorer,
    parent: ServedParent | StoredParent,
    inputs: EvalInputs,
    top_k: int,
    progress: Callable[[int], None],
) -> Reading:
    """Score one sample after the other, on both sides at once; never are the scores of two samples in memory."""
    reading = Reading([])
    for number, ids in enumerate(inputs.samples):
        ours, theirs = await gather_all([parent.score(number), variant.score(ids, top_k)])
        reading.add(ours, theirs)
        progress(len(ids) - 1)
    return reading


async def _both_complete(
    servers: Servers, store: ParentStore, task: GenerationTask, progress: Callable[[int], None]
) -> tuple[list[Completion], list[Completion]]:
    """Let both sides complete the prompts: (parent's, variant's)."""
    key = store.completions_key(task)
    variant = servers.variant.scorer.complete_all(task.requests, task.sampling, progress)
    if servers.parent is None:
        return stored_completions(store.require(key, "completions")), await variant
    parent = servers.parent.scorer.complete_all(task.requests, task.sampling, lambda _: None)
    ours, theirs = await gather_all([parent, variant])
    keep_completions(store.store, key, ours, servers.parent.model.engine)
    return ours, theirs


def token_measurements(distances: Sequence[SampleDistances], inputs: EvalInputs) -> dict[str, Any]:
    """Sum up the distances of each sample by the subsets of its tokens; CalibrationError if none was generated."""
    chats, divergences = [], []
    for number, one in enumerate(distances):
        subsets = inputs.subsets(number)
        sums = {name: one.sums(marked) for name, marked in subsets.items()}
        chats.append(ChatMetrics(chat=inputs.names[number], positions=len(one), **sums))
        divergences.append(
            [value for value, marked in zip(one.divergence, subsets["generated"], strict=True) if marked]
        )
    generated = [values for values in divergences if values]
    if not generated:
        raise CalibrationError(["no held-out chat has tokens of its answer; raise --max-tokens, or pass more text"])
    p99 = percentile(generated, 0.99)
    return {
        "chats": [chat.model_dump() for chat in chats],
        "kl_p99": {"value": p99.value, "low": p99.low, "high": p99.high},
    }


def within_context(inputs: EvalInputs, context_tokens: int | None) -> EvalInputs:
    """Cut samples and leave out prompts, so that both servers take them with what they generate."""
    context = context_tokens or sys.maxsize

    def fitting(task: GenerationTask) -> GenerationTask:
        room = min(IN_FLIGHT_TOKENS, context - task.sampling.new_tokens)
        return replace(task, requests=tuple(request for request in task.requests if len(request.ids) <= room))

    return replace(
        inputs,
        samples=tuple(ids[: context - 1] for ids in inputs.samples),
        prompts=fitting(inputs.prompts),
    )


def cut_lines(given: EvalInputs, kept: EvalInputs) -> list[str]:
    """Say what `within_context` cut and left out."""
    cut = sum(len(before) > len(after) for before, after in zip(given.samples, kept.samples, strict=True))
    left_out = len(given.prompts.requests) - len(kept.prompts.requests)
    lines = [f"{cut} of {len(kept.samples)} samples were cut to the servers' max_model_len"] if cut else []
    return [*lines, f"{left_out} prompts are too long for the servers, and left out"] if left_out else lines


def lumped_line(evidence: dict[str, Any], top_k: int) -> str:
    """Say of how much of the probability the KL is an estimate, and what to do about much."""
    share = evidence["lumped"]["parent"]
    line = f"{top_k} log-probabilities per position, {share:.1%} of the probability in other tokens"
    advice = "; the KL there is an estimate: start both servers with --max-logprobs 1024"
    return line + advice if share > _MUCH_LUMPED and top_k < TOP_K else line


def _method(variant: str, parent: str) -> str:
    return variant if variant == parent else f"{variant}, parent {parent}"


if __name__ == "__main__":
    sys.exit(run_child(measure))
