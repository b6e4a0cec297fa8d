"""Shadowing: which answers are scored, on what, and what ends it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from gateway.keys.stored import StoredKey, keys_in_force
from gateway.proxy.shadow import MAX_TOKENS, Agreement, Sample, Sampling, ScoredToken, Shadow, compare
from serving.errors import ProbeFailed
from serving.replica import Replica
from tests.fakes.running import eventually

NEW, OLD = (Replica(f"{name}-1", name, "int4", "http://127.0.0.1:9", name) for name in ("new", "old"))
SAMPLE = Sample(json.dumps([{"role": "user", "content": "hi"}]).encode(), "an answer")


@dataclass
class Engine:
    """Answers like the control requests of replicas; the new variant is `shift` nats less sure of every token."""

    shift: float = 0.1
    requests: int | None = 0
    prompt_tokens: int = 10
    answer_tokens: int = 8
    failure: str = ""
    scored: list[str] = field(default_factory=list)

    async def requests_in_engine(self, replica: Replica) -> int | None:
        return self.requests

    async def chat_tokens(self, replica: Replica, messages: Any) -> list[int]:
        return list(range(self.prompt_tokens))

    async def token_ids(self, replica: Replica, text: str) -> tuple[int, ...]:
        return tuple(range(self.answer_tokens))

    async def scored_tokens(self, replica: Replica, ids: Sequence[int]) -> list[tuple[float, int]]:
        if self.failure:
            raise ProbeFailed(self.failure)
        self.scored.append(replica.variant)
        worse = replica is NEW
        return [(-1.0 - self.shift * worse, 1 + worse * (place % 2)) for place in range(len(ids) - 1)]


def shadow(engine: Engine, results: list[Agreement], *, spills: bool = False, ready: bool = True) -> Shadow:
    pair = (NEW, OLD) if ready else None
    return Shadow(engine, lambda: pair, lambda: spills, lambda _: ready, results.append)


async def test_an_answer_is_scored_on_both() -> None:
    """The difference per token is the shift; how often the token was the first choice is told of both."""
    engine = Engine()
    result = await shadow(engine, []).score(SAMPLE)
    assert result is not None
    assert result.difference == pytest.approx(0.1)
    assert (result.agreement, result.old_agreement) == (0.5, 1.0)
    assert engine.scored == ["new", "old"]


@pytest.mark.parametrize(
    "engine, options",
    [
        (Engine(requests=1), {}),
        (Engine(requests=None), {}),
        (Engine(prompt_tokens=MAX_TOKENS), {}),
        (Engine(answer_tokens=2), {}),
        (Engine(), {"spills": True}),
        (Engine(), {"ready": False}),
    ],
)
async def test_what_is_not_scored(engine: Engine, options: dict[str, bool]) -> None:
    """Busy engines, long prompts, short answers, an alias that spills, and variants that are not ready."""
    assert await shadow(engine, [], **options).score(SAMPLE) is None
    assert engine.scored == []


async def test_one_at_a_time() -> None:
    """While one waits, others are dropped; each is scored by the task, and reported."""
    results: list[Agreement] = []
    made = shadow(Engine(), results)
    made.offer(SAMPLE)
    made.offer(SAMPLE)
    made.start()
    await eventually(lambda: len(results) == 1)
    made.offer(SAMPLE)
    await eventually(lambda: len(results) == 2)
    made.stop()


@pytest.mark.parametrize(
    "failure, ends", [("new-1: /v1/completions answered 400", False), ("new-1: /v1/completions: ReadError", True)]
)
async def test_the_death_of_an_engine_ends_it(failure: str, ends: bool) -> None:
    """A refusal of one answer does not."""
    made = shadow(Engine(failure=failure), [])
    made.start()
    made.offer(SAMPLE)
    await eventually(lambda: made._waiting is None or made.ended)
    assert bool(made.ended) is ends
    made.stop()


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
def test_the_share_is_exact(share: float) -> None:
    """Of a thousand answers exactly so many are taken."""
    sampling = Sampling(share)
    assert abs(sum(sampling.take() for _ in range(1000)) - 1000 * share) <= 1


def test_nothing_to_compare() -> None:
    """Scores of different lengths are of different texts."""
    assert compare([], []) is None
    assert compare([ScoredToken(-1.0, 1)], []) is None


def test_a_key_can_opt_out() -> None:
    """In the keys file; the others take part."""
    keys = keys_in_force({"a": StoredKey(sha256=("0" * 64,), shadow=False), "b": StoredKey(sha256=("1" * 64,))})
    assert {issued.caller.name: issued.caller.shadow for issued in (keys.issued or {}).values()} == {
        "a": False,
        "b": True,
    }
