"""A closed loop against the fake: how many run, what is sent, what is counted, and when it gives up."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest

from serving.errors import ProbeFailed
from serving.measuring.figures import load_figures
from serving.measuring.load_generator import Effort, LoadGenerator
from serving.measuring.measuring import frequent_failure
from serving.measuring.mix import parse_mix, request_lengths
from serving.measuring.streaming import Target
from tests.fakes.running import FakeReplica, running_fake

COMPLETIONS = "/v1/completions"
MIX = parse_mix("20:8:1,8:20:1")


@asynccontextmanager
async def generator(*flags: str, key: str | None = None) -> AsyncIterator[tuple[LoadGenerator, FakeReplica]]:
    """A load generator and the fake that it loads."""
    async with running_fake(*flags) as fake, httpx.AsyncClient(trust_env=False) as client:
        target = Target(client, fake.url, "m1", key)
        yield LoadGenerator(target, 1000, lambda: request_lengths(MIX, 4096)), fake


async def test_requests_are_what_vllm_understands() -> None:
    """Token ids, an exact length of the answer, usage in each chunk, and no seed."""
    async with generator() as (load, fake):
        await load.warm_up()
        bodies = [request["body"] for request in await fake.requested(COMPLETIONS, 3)]
        endings = await fake.ended(3)
    for body, ending in zip(bodies, endings, strict=True):
        assert "seed" not in body
        assert body["ignore_eos"] is True
        assert body["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}
        assert ending == {"event": "finished", "tokens": body["max_tokens"]}
        assert all(isinstance(token, int) for token in body["prompt"])


async def test_every_prompt_is_new() -> None:
    """No two requests begin alike, also across levels, though their lengths are the same."""
    async with generator() as (load, fake):
        for _ in range(2):
            await load.observe(2, Effort(0, 6), lambda _: None)
        prompts = [request["body"]["prompt"] for request in fake.requests(COMPLETIONS)]
    assert len({tuple(prompt[:6]) for prompt in prompts}) == len(prompts) >= 12


@pytest.mark.parametrize("concurrency", [1, 5])
async def test_so_many_run_at_a_time(concurrency: int) -> None:
    """The fake never has more, and its places are all taken when the window opens."""
    told: list[int] = []
    async with generator("--fake-tokens-per-second", "400") as (load, fake):
        observed = await load.observe(concurrency, Effort(0, 3 * concurrency), told.append)
        endings = await fake.ended(3 * concurrency)
        async with httpx.AsyncClient() as client:
            metrics = (await client.get(f"{fake.url}/metrics")).text
    assert told[-1] >= 3 * concurrency
    assert load_figures(concurrency, observed.exchanges, observed.window).requests >= 3 * concurrency
    assert len(observed.exchanges) - len([end for end in endings if end["event"] == "finished"]) <= concurrency
    assert 'num_requests_running{engine="0",model_name="m1"} 0.0' in metrics
    assert observed.busy_share >= 0


async def test_counts_come_from_usage() -> None:
    """What was seen of finished requests is what the fake says it generated."""
    async with generator() as (load, fake):
        observed = await load.observe(1, Effort(0, 4), lambda _: None)
        bodies = [request["body"] for request in fake.requests(COMPLETIONS)]
    finished = [each for each in observed.exchanges if each.ended_seconds is not None]
    assert len(finished) >= 4
    for exchange, body in zip(finished, bodies, strict=False):
        assert exchange.failure is None
        assert sum(arrival.tokens for arrival in exchange.arrivals()) <= body["max_tokens"]
        assert exchange.prompt_tokens == len(body["prompt"])


async def test_some_errors_are_counted() -> None:
    """Three refusals don't end a level; they are told with their reason."""
    async with generator("--fake-fail-first", "3") as (load, _):
        observed = await load.observe(2, Effort(0, 4), lambda _: None)
    figures = load_figures(2, observed.exchanges, observed.window)
    assert figures.errors == 3
    assert figures.requests >= 4
    assert frequent_failure(observed.exchanges).startswith("503: The engine is currently busy")


async def test_a_level_without_hope_ends() -> None:
    """When nothing but errors comes back, the time is not waited for."""
    async with generator("--fake-fail-first", "999", "--fake-fail-status", "500") as (load, _):
        observed = await load.observe(2, Effort(3600, 4), lambda _: None)
    figures = load_figures(2, observed.exchanges, observed.window)
    assert figures.requests == 0
    assert figures.errors >= 6
    assert frequent_failure(observed.exchanges) == "500: Internal server error"


async def test_a_dropped_stream_is_an_error() -> None:
    """An answer that breaks off is none."""
    async with generator("--fake-drop-after-tokens", "2") as (load, _):
        observed = await load.observe(1, Effort(3600, 2), lambda _: None)
    assert all(each.failure for each in observed.exchanges if each.ended_seconds is not None)


async def test_an_error_in_the_stream_is_an_error() -> None:
    """An engine that dies says so in an event, and nothing answers after it."""
    async with generator("--fake-crash-after-requests", "1") as (load, _):
        observed = await load.observe(1, Effort(3600, 2), lambda _: None)
    assert any("EngineCore encountered an issue" in (each.failure or "") for each in observed.exchanges)


async def test_warming_up_tells_what_is_wrong() -> None:
    """The first request that fails ends it, with the server's own words."""
    async with generator("--api-key", "right", key="wrong") as (load, _):
        with pytest.raises(ProbeFailed, match="a request to warm up failed: 401: Unauthorized"):
            await load.warm_up()
