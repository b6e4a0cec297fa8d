"""A vLLM server as a model to measure, through a fake of known distributions."""

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise

import pytest

from quantize.errors import ReplicaError
from quantize.evaluation.replica_scores import ReplicaScorer, scorer, without_end
from quantize.evaluation.request_window import PromptWindow, gather_all
from quantize.evaluation.sampling import GenerationRequest, SamplingParameters, noise_seed
from quantize.evaluation.top_k_metrics import sample_distances
from tests.fakes.distributions import next_logprobs, ranked
from tests.fakes.running import running_fake

VOCABULARY = 40
KNOWN = ("--fake-vocabulary", str(VOCABULARY))
IDS = [5, 17, 3, 39, 0, 5, 5]
NOISE = 0.7
SAMPLING = SamplingParameters(0.6, 0.95, 0, 1.0, end_ids=(2,), new_tokens=64)


@asynccontextmanager
async def known(*flags: str) -> AsyncIterator[ReplicaScorer]:
    """A client of a fake with a known distribution."""
    async with running_fake(*KNOWN, *flags) as fake, scorer(fake.url, None) as client:
        await client.identify()
        yield client


async def test_what_a_server_says_of_itself() -> None:
    """Name, directory, context and engine, and the fingerprint of an answer."""
    async with (
        running_fake("--max-model-len", "900", "--fingerprint-value", "m1-int4") as fake,
        scorer(f"{fake.url}/v1", None) as client,
    ):
        served = await client.identify()
    assert (served.name, served.root, served.max_model_len) == ("m1", "/models/m1", 900)
    assert (served.engine, served.fingerprint) == ("vllm 0.32.0", "m1-int4")


async def test_a_key_is_sent() -> None:
    """A server that wants a key gets it; without it, it refuses."""
    async with running_fake("--api-key", "sesame") as fake:
        async with scorer(fake.url, "sesame") as client:
            assert (await client.identify()).name == "m1"
        async with scorer(fake.url, None) as client:
            with pytest.raises(ReplicaError, match=f"{fake.url}: is no vLLM server: 401"):
                await client.identify()


@pytest.mark.parametrize("wanted, given", [(128, 20), (20, 20), (7, 7)])
async def test_the_most_log_probabilities_that_a_server_gives(wanted: int, given: int) -> None:
    """As many as are wanted, or the server's --max-logprobs."""
    async with known() as client:
        assert await client.most_logprobs(wanted) == given


@pytest.mark.parametrize("top", [1, 5, VOCABULARY])
async def test_scores_are_those_of_the_distribution(top: int) -> None:
    """At each position the token that came, then the likeliest in their order."""
    async with known("--max-logprobs", str(VOCABULARY)) as client:
        scores = await client.score(IDS, top)
    assert len(scores) == len(IDS) - 1
    for place, prediction in enumerate(scores.predictions()):
        expected = next_logprobs(IDS[place], VOCABULARY, 0.0)
        ordered = ranked(expected)
        assert (prediction.came, prediction.first) == (IDS[place + 1], ordered[0])
        assert set(prediction.logprobs) == {IDS[place + 1], *ordered[:top]}
        for token, logprob in prediction.logprobs.items():
            assert logprob == pytest.approx(expected[token], rel=1e-6)
    assert scores.came() == pytest.approx([next_logprobs(a, VOCABULARY, 0.0)[b] for a, b in pairwise(IDS)], rel=1e-6)


async def test_the_divergence_of_two_servers_is_exact() -> None:
    """With the whole vocabulary named, KL is that of both distributions; with less, it is estimated."""
    async with known("--max-logprobs", "40") as parent, known("--max-logprobs", "40", "--fake-noise", "0.7") as variant:
        whole, some = [
            sample_distances(*await gather_all([parent.score(IDS, top), variant.score(IDS, top)]))
            for top in (VOCABULARY, 8)
        ]
    exact = []
    for token in IDS[:-1]:
        p, q = next_logprobs(token, VOCABULARY, 0.0), next_logprobs(token, VOCABULARY, NOISE)
        exact.append(math.fsum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True)))
    assert list(whole.divergence) == pytest.approx(exact, abs=1e-5)
    assert 0.5 * sum(exact) < some.lower_bound < sum(exact)
    assert some.lower_bound < sum(some.divergence) < 1.5 * sum(exact)


async def test_completions_follow_prompt_and_seed() -> None:
    """Token ids without the end token, finished as the server says, whatever runs beside them."""
    requests = [GenerationRequest((number, 7, 9), number % 2, number) for number in range(1, 12)]
    done: list[int] = []
    async with known("--fake-tokens", "6") as client:
        completions = await client.complete_all(requests, SAMPLING, done.append)
        alone = await client.complete(requests[3], SAMPLING)
    assert completions[3] == alone
    assert all(one.finished and len(one.ids) == 5 for one in completions)
    first = {100 + noise_seed(request) % 50 for request in requests}
    assert {one.ids[0] for one in completions} == first
    assert sum(done) == len(requests) * SAMPLING.new_tokens


async def test_a_completion_that_was_cut() -> None:
    """One that reaches the limit is not finished."""
    async with known("--fake-tokens", "100") as client:
        completion = await client.complete(GenerationRequest((1, 2), 0, 0), SAMPLING)
    assert (len(completion.ids), completion.finished) == (SAMPLING.new_tokens, False)


@pytest.mark.parametrize("requests, tokens, most", [(8, 100, 8), (8, 700, 2), (2, 100, 2), (8, 5000, 1)])
async def test_prompts_in_flight_are_few_and_short_together(requests: int, tokens: int, most: int) -> None:
    """No more than so many, nor more than the tokens that a server reads in a step; a longer one runs alone."""
    window = PromptWindow(requests, 2000)
    running: list[int] = []
    seen: list[int] = []

    async def hold() -> None:
        async with window.holding(tokens):
            running.append(tokens)
            seen.append(len(running))
            await asyncio.sleep(0)
            running.pop()

    await gather_all([hold() for _ in range(20)])
    assert (len(seen), max(seen)) == (20, most)


async def test_a_busy_server_is_asked_again() -> None:
    """A full queue passes."""
    async with running_fake(*KNOWN, "--fake-fail-first", "1") as fake, scorer(fake.url, None, 0.01) as client:
        scores = await client.score(IDS, 3)
    assert len(scores) == len(IDS) - 1


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--fake-no-prompt-logprobs",), "answers without prompt_logprobs; pass a vLLM server's own address"),
        (("--max-model-len", "4"), "failed to score a sample of 7 tokens: 400 This model's maximum context length"),
        (("--fake-crash-after-requests", "1"), "failed to score a sample of 7 tokens: 500 EngineCore encountered"),
    ],
)
async def test_one_line_says_what_a_server_lacks(flags: tuple[str, ...], message: str) -> None:
    """The URL, what was asked, and what it answered."""
    async with known(*flags) as client:
        with pytest.raises(ReplicaError) as raised:
            await client.score(IDS, 3)
    assert str(raised.value).startswith(client.url)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


async def test_a_server_that_is_not_there() -> None:
    """Nobody listens: one line, not a traceback."""
    async with scorer("http://127.0.0.1:1", None) as client:
        with pytest.raises(ReplicaError, match=r"http://127.0.0.1:1: is no vLLM server: .*is the replica running\?"):
            await client.identify()


@pytest.mark.parametrize("ids, kept", [([5, 6, 2], (5, 6)), ([5, 2, 7], (5,)), ([5, 6], (5, 6)), ([], ()), ([2], ())])
def test_the_end_token_is_not_part_of_a_completion(ids: list[int], kept: tuple[int, ...]) -> None:
    """What follows it isn't, either."""
    assert without_end(ids, (2, 9)) == kept
