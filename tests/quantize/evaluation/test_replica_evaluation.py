"""An evaluation through two servers: fakes whose distributions are known, so that every figure is."""

import asyncio
import json
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest

from config.golden import Golden
from config.measurements import Measurements
from config.quality import Quality
from quantize.errors import CalibrationError, ReplicaError
from quantize.evaluation.inputs import EvalInputs, GenerationTask
from quantize.evaluation.replica_evaluation import cut_lines, measure, within_context
from quantize.evaluation.sampling import GenerationRequest, SamplingParameters
from quantize.running.worker import WorkerChannel
from tests.fakes.distributions import next_logprobs, ranked
from tests.fakes.running import FakeReplica, running_fake
from tests.quantize.chats import chat, write_chats
from tests.quantize.command_line import run
from tests.quantize.models import write_hollow_model, write_tokenizer

pytest.importorskip("transformers", reason="needs transformers: install the quantize extra")


VOCABULARY, NOISE, TOP_K = 560, 0.3, 20
PARENT = ("--fake-vocabulary", str(VOCABULARY), "--fake-tokens", "40")
VARIANT = (*PARENT, "--fake-noise", str(NOISE))
SAMPLES = 5


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with a tokenizer; no weights are ever read."""
    directory = write_hollow_model(tmp_path_factory.mktemp("models") / "base")
    write_tokenizer(directory, [json.dumps(chat(number)) for number in range(30)])
    return directory


def sample_of(number: int, *, is_text: bool = False) -> dict[str, Any]:
    """Thirty token ids, of which ten are reasoning and ten an answer."""
    ids = [(number * 37 + place * 11) % 500 for place in range(30)]
    subsets = {} if is_text else {"reasoning": [[10, 20]], "answer": [20, 30]}
    return {"ids": ids, "sha256": f"{number:064d}", "is_text": is_text, **subsets}


def job_of(base: Path, variant: Path, urls: tuple[str, str | None], cache: Path, **changes: Any) -> dict[str, Any]:
    """The job that `quantize.evaluation.evaluate` gives the child."""
    return {
        "base": str(base),
        "variant": str(variant),
        "base_digest": "0" * 64,
        "cache": str(cache),
        "samples": [sample_of(number, is_text=number == 0) for number in range(SAMPLES)],
        "prompted": [],
        "prompts": 0,
        "seeds": 2,
        "new_tokens": 30,
        "questions": [],
        "task_tokens": 40,
        "replica": urls[0],
        "parent_replica": urls[1],
        **changes,
    }


async def measured(job: dict[str, Any]) -> tuple[Measurements, dict[str, Any], list[str]]:
    """Do the child's work: measurements, evidence, logged lines."""
    stream = StringIO()
    result = await asyncio.to_thread(measure, job, WorkerChannel(cast("Any", stream)))
    events = [json.loads(line).get("event", {}) for line in stream.getvalue().splitlines()]
    lines = [event["line"] for event in events if event]
    return Measurements.model_validate(result["measurements"]), json.loads(json.dumps(result["evidence"])), lines


@asynccontextmanager
async def both(variant: tuple[str, ...] = VARIANT) -> AsyncIterator[tuple[FakeReplica, FakeReplica]]:
    """Run the variant's fake and the parent's."""
    async with (
        running_fake(*variant, served="variant") as variant_fake,
        running_fake(*PARENT, served="parent") as parent_fake,
    ):
        yield variant_fake, parent_fake


def expected_divergence(previous: int, token: int) -> float:
    """KL over the tokens that both fakes name and the rest; inside the rest as among the named."""
    p, q = next_logprobs(previous, VOCABULARY, 0.0), next_logprobs(previous, VOCABULARY, NOISE)
    named = [set(ranked(of)[:TOP_K]) | {token} for of in (p, q)]
    known = named[0] & named[1]
    p_known, q_known = (sum(math.exp(of[one]) for one in known) for of in (p, q))
    among = sum(math.exp(p[one]) / p_known * (p[one] - math.log(p_known) - q[one] + math.log(q_known)) for one in known)
    rest = 1 - p_known
    inside = sum(math.exp(p[one]) * (p[one] - q[one]) for one in known)
    return inside + rest * math.log(rest / (1 - q_known)) + rest * among


async def test_every_figure_is_that_of_the_distributions(base: Path, tmp_path: Path) -> None:
    """Sums by chat and subset, the engine, k, and no divergence of the parent from itself."""
    async with both() as (variant, parent):
        found, evidence, _ = await measured(job_of(base, tmp_path, (variant.url, parent.url), tmp_path / "cache"))
    assert (found.method, found.top_k, found.kl_floor) == ("vllm 0.32.0", TOP_K, 0.0)
    assert [chat.positions for chat in found.chats] == [29] * SAMPLES
    for number, measured_chat in enumerate(found.chats):
        ids = sample_of(number)["ids"]
        divergences = [expected_divergence(a, b) for a, b in pairwise(ids)]
        assert measured_chat.generated.divergence == pytest.approx(
            sum(divergences[0 if number == 0 else 9 :]), abs=1e-3
        )
        assert measured_chat.generated.tokens == (29 if number == 0 else 20)
        assert (measured_chat.reasoning.tokens, measured_chat.answer.tokens) == ((0, 0) if number == 0 else (10, 10))
    assert found.kl_p99.low <= found.kl_p99.value <= found.kl_p99.high
    assert evidence["engines"] == {"parent": "vllm 0.32.0", "variant": "vllm 0.32.0"}
    assert 0 < evidence["lumped"]["parent"] < 1
    assert len(evidence["worst"]) == SAMPLES
    assert len(Golden.model_validate(evidence["golden"]).parent) == 29


async def test_the_parent_need_not_be_served_twice(base: Path, tmp_path: Path) -> None:
    """The next evaluation of the same samples takes its side from the store, to the same figures."""
    cache = tmp_path / "cache"
    asked: dict[str, Any] = {"prompts": 3, "prompted": [chat_sample(base, number) for number in range(3)]}
    async with both() as (variant, parent):
        first, _, _ = await measured(job_of(base, tmp_path, (variant.url, parent.url), cache, **asked))
        requests = len(parent.requests("/v1/completions"))
        second, evidence, _ = await measured(job_of(base, tmp_path, (variant.url, None), cache, **asked))
        assert len(parent.requests("/v1/completions")) == requests
    assert second == first
    assert len(first.completions) == 6
    assert {(pair.parent.tokens, pair.parent.unfinished) for pair in first.completions} == {(30, True)}
    assert len(evidence["generations"]) == 6


async def test_a_parent_that_was_never_served(base: Path, tmp_path: Path) -> None:
    """Without its server and without an earlier evaluation there is nothing to compare with."""
    async with running_fake(*VARIANT) as variant:
        with pytest.raises(ReplicaError, match=r"pass --parent-replica URL of a vLLM server that serves the base"):
            await measured(job_of(base, tmp_path, (variant.url, None), tmp_path / "cache"))


async def test_a_parent_that_dies_keeps_nothing(base: Path, tmp_path: Path) -> None:
    """One line names the server; the store has no half of its scores."""
    async with both() as (variant, _), running_fake(*PARENT, "--fake-crash-after-requests", "4") as dying:
        with pytest.raises(ReplicaError, match=f"{dying.url}: failed to score a sample of 30 tokens: 500 EngineCore"):
            await measured(job_of(base, tmp_path, (variant.url, dying.url), tmp_path / "cache"))
    assert list((tmp_path / "cache").iterdir()) == []


async def test_swapped_servers_are_noticed_by_the_golden_prompt(base: Path, tmp_path: Path) -> None:
    """Each server answers as the other model is recorded."""
    async with both() as (variant, parent):
        _, evidence, _ = await measured(job_of(base, tmp_path, (variant.url, parent.url), tmp_path / "cache"))
        (tmp_path / "evaluation.json").write_text(json.dumps(evidence))
        await measured(job_of(base, tmp_path, (variant.url, parent.url), tmp_path / "cache"))
        with pytest.raises(ReplicaError, match="are --replica and --parent-replica swapped"):
            await measured(job_of(base, tmp_path, (parent.url, variant.url), tmp_path / "cache"))


async def test_questions_are_asked_through_the_servers(base: Path, tmp_path: Path) -> None:
    """Both sides answer each question once, without noise."""
    questions = [{"messages": [["user", "1 + 1?"]], "answer": "2"}, {"messages": [["user", "?"]], "answer": "no"}]
    async with both() as (variant, parent):
        found, _, _ = await measured(
            job_of(base, tmp_path, (variant.url, parent.url), tmp_path / "cache", questions=questions)
        )
    assert found.tasks is not None
    assert (len(found.tasks.parent), found.tasks.variant) == (2, (False, False))


async def test_samples_without_answers_measure_nothing(base: Path, tmp_path: Path) -> None:
    """A gate stands on generated tokens."""
    prompts = [{**sample_of(1), "reasoning": [], "answer": [30, 30]}]
    async with both() as (variant, parent):
        with pytest.raises(CalibrationError, match="no held-out chat has tokens of its answer"):
            await measured(job_of(base, tmp_path, (variant.url, parent.url), tmp_path / "cache", samples=prompts))


SAMPLING = SamplingParameters(0.6, 0.95, 0, 1.0, (2,), new_tokens=100)


def inputs_of(sizes: list[int], prompts: list[int]) -> EvalInputs:
    """Samples and prompts of these sizes."""
    requests = tuple(GenerationRequest(tuple([1] * size), 0, number) for number, size in enumerate(prompts))
    return EvalInputs(
        samples=tuple(tuple([1] * size) for size in sizes),
        names=tuple(map(str, sizes)),
        reasoning=tuple(() for _ in sizes),
        answers=tuple((0, size) for size in sizes),
        texts=tuple(False for _ in sizes),
        prompts=GenerationTask(requests, SAMPLING),
        questions=GenerationTask((), SAMPLING),
    )


def test_what_the_servers_cannot_take_is_cut_and_left_out() -> None:
    """Samples leave room for one token, prompts for all that are to be generated; both are said."""
    given = inputs_of([50, 300], [80, 150, 300])
    kept = within_context(given, 256)
    assert [len(ids) for ids in kept.samples] == [50, 255]
    assert [len(request.ids) for request in kept.prompts.requests] == [80, 150]
    assert cut_lines(given, kept) == [
        "1 of 2 samples were cut to the servers' max_model_len",
        "1 prompts are too long for the servers, and left out",
    ]
    assert cut_lines(given, within_context(given, None)) == []


def chat_sample(base: Path, number: int) -> dict[str, Any]:
    """A chat as token ids, from which a prompt can be cut."""
    from quantize.calibration.tokenizing import load_tokenizer  # noqa: PLC0415 - imports transformers

    text = load_tokenizer(base).apply_chat_template(chat(number)["messages"], tokenize=False)
    return {**sample_of(number), "ids": load_tokenizer(base)(text, add_special_tokens=False)["input_ids"]}


async def test_evaluate_through_replicas(base: Path, tmp_path: Path) -> None:
    """The command measures a format that this package can't read, and prints figures with intervals."""
    variant = write_hollow_model(tmp_path / "fp8", quantization_config={"quant_method": "fp8"})
    scope = ("--data", write_chats(tmp_path / "chats.jsonl", 12), "--every-row", "--eval-prompts", 3, "--json")
    async with both() as (served, parent):
        urls = ("--replica", served.url, "--parent-replica", parent.url)
        done = await asyncio.to_thread(run, "evaluate_main", variant, "--against", base, *scope, *urls)
        again = await asyncio.to_thread(run, "evaluate_main", variant, "--against", base, *scope, *urls[:2])
    assert done.returncode == 0, done.stderr
    quality = Quality.model_validate_json(done.stdout)
    assert (quality.method, quality.top_k, quality.chats) == ("vllm 0.32.0", TOP_K, 12)
    assert (quality.bound("kl_mean", upper=False) or 0) < quality.kl_mean
    assert quality.generation is not None
    assert again.stdout == done.stdout


async def test_a_parent_alone_is_refused(base: Path, tmp_path: Path) -> None:
    """One line on stderr, exit code 2."""
    done = await asyncio.to_thread(
        run, "evaluate_main", tmp_path, "--against", base, "--parent-replica", "http://127.0.0.1:1"
    )
    assert done.returncode == 2
    assert "--parent-replica needs --replica" in done.stderr
