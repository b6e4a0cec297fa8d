"""Text that the base writes itself: who is asked what, on which side it lies, and that it is written once."""

import asyncio
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantize.base import BaseModel, read_base
from quantize.calibration.datasets import is_held_out, read_datasets, split_records, with_split_keys
from quantize.calibration.generation_child import (
    TokenizedPrompt,
    batches,
    cache_bytes_per_token,
    cache_room,
    until_stop,
)
from quantize.calibration.parsing import parse_line
from quantize.calibration.records import Message, Record
from quantize.calibration.replica_client import Answer, Question, Replica, Sampling, answer_of, request_body
from quantize.calibration.self_generation import Prompt, chosen, line_of, prompts_of, self_generate
from quantize.errors import CalibrationError, RecipeError
from quantize.running.context import RunContext
from quantize.running.progress import ProgressReporter
from quantize.running.worker import child_environ
from tests.fakes.running import running_fake
from tests.quantize.chats import chat
from tests.quantize.models import write_hollow_model


def row_of(line: dict[str, Any]) -> Record:
    """The row of a line."""
    row = parse_line(json.dumps(line), "f:1")
    assert isinstance(row, Record)
    return row


ROWS = [row_of(chat(number)) for number in range(60)]


def origins(rows: list[Record], count: int, held_out: int, seed: int = 0) -> list[str]:
    """The rows on whose side each of the chosen prompts lies."""
    return [prompt.origin for prompt, _ in chosen(rows, count, held_out, seed)]


@given(st.integers(1, 150), st.integers(0, 30), st.integers(0, 9))
def test_no_prompt_of_the_evaluation_gets_into_calibration(count: int, held_out: int, seed: int) -> None:
    """As many as wanted are asked for on either side, and each lies where its prompt's own row lies."""
    sides = {row.sha256: is_held_out(row) for row in ROWS}
    asked = [sides[origin] for origin in origins(ROWS, count, held_out, seed)]
    assert asked == [False] * count + [True] * held_out


@given(st.permutations(ROWS), st.integers(0, 3))
def test_the_order_of_rows_changes_nothing(rows: list[Record], seed: int) -> None:
    """The seed decides who is asked first, and with which seed."""
    assert chosen(rows, 50, 5, seed) == chosen(ROWS, 50, 5, seed)


def test_prompts_come_again_when_they_run_out() -> None:
    """In turns, each with a number of its own."""
    usable = sum(not is_held_out(row) for row in ROWS)
    turns = [turn for _, turn in chosen(ROWS, 2 * usable + 1, 0, 0)]
    assert turns == [0] * usable + [1] * usable + [2]


@pytest.mark.parametrize("first", [0, 1, 2, 3, 4])
def test_a_prompt_lies_where_all_rows_with_it_lie(first: int) -> None:
    """Of several answers to one question, the one with the smallest digest decides for all, and for the prompt."""
    rows = [row_of({"prompt": "Why?", "completion": f"Since {number}."}) for number in range(first, first + 4)]
    (prompt,) = prompts_of(rows)
    sides = set(map(is_held_out, with_split_keys(rows)))
    assert sides == {is_held_out(Record((), "", "", origin=prompt.origin))}
    if sides == {True}:
        with pytest.raises(CalibrationError, match="no prompts to answer"):
            chosen(rows, 1, 0, 0)


def test_only_prompts_can_be_answered() -> None:
    """Bare text asks nothing, and what was generated already is not asked again."""
    mark = {"from": "a" * 64, "finished": True}
    rows = [row_of({"text": "a"}), row_of({"prompt": "Why?", "completion": "So.", "self_generated": mark})]
    assert prompts_of(rows) == []


@pytest.mark.parametrize("finished", [True, False])
def test_an_answer_is_a_line_of_calibration_text(finished: bool) -> None:
    """It remembers where it comes from, and whether a limit cut it."""
    prompt = Prompt((Message("system", "s"), Message("user", "ü?")), "c" * 64)
    row = row_of(json.loads(line_of(prompt, Answer("<think>a</think>b", finished))))
    assert (row.messages, row.completion) == (prompt.messages, "<think>a</think>b")
    assert (row.origin, row.finished, row.generated) == ("c" * 64, finished, True)


def test_an_empty_answer_is_none() -> None:
    """There is nothing to calibrate on in it."""
    assert line_of(Prompt((Message("user", "a"),), "c" * 64), Answer(" \n", finished=True)) == ""


@pytest.mark.parametrize(
    "message,reason,completion,finished",
    [
        ({"content": "4"}, "stop", "4", True),
        ({"content": "4"}, "length", "4", False),
        ({"content": "4", "reasoning": "two twos\n"}, "stop", "<think>\ntwo twos\n</think>\n\n4", True),
        ({"content": "\n\n4", "reasoning_content": "two twos"}, "stop", "<think>\ntwo twos\n</think>\n\n4", True),
        ({"content": None, "reasoning": "two"}, "length", "<think>\ntwo", False),
        ({"content": "<think>a</think>4", "reasoning": None}, "stop", "<think>a</think>4", True),
        ({"content": None}, "stop", "", True),
    ],
)
def test_reasoning_goes_back_in_front(message: dict[str, Any], reason: str, completion: str, finished: bool) -> None:
    """Whatever a server took apart; a thought that was cut stays open."""
    told = answer_of({"choices": [{"message": message, "finish_reason": reason}]})
    assert told == Answer(completion, finished)


def test_a_request_carries_its_seed() -> None:
    """And draws from the whole vocabulary."""
    body = request_body("m", Question((Message("user", "a"),), 7), Sampling(100, 0.9))
    assert body == {
        "model": "m",
        "messages": [{"role": "user", "content": "a"}],
        "max_tokens": 100,
        "temperature": 0.9,
        "top_p": 1.0,
        "seed": 7,
    }


@pytest.mark.parametrize(
    "ids,kept,finished", [([1, 2, 9, 9], [1, 2], True), ([1, 2], [1, 2], False), ([8], [], True), ([], [], False)]
)
def test_generated_ids_end_at_a_stop_token(ids: list[int], kept: list[int], finished: bool) -> None:
    """Or else the limit cut them."""
    assert until_stop(ids, frozenset({8, 9})) == (kept, finished)


@given(st.lists(st.integers(1, 300), max_size=200), st.integers(1, 500), st.integers(1, 10**6))
def test_batches_hold_every_prompt_once_and_fit(lengths: list[int], new_tokens: int, bytes_per_token: int) -> None:
    """Prompts of like length lie together; keys and values stay under 2 GB unless one prompt alone is larger."""
    prompts = [TokenizedPrompt(place, (0,) * length, 0) for place, length in enumerate(lengths)]
    groups = batches(prompts, new_tokens, bytes_per_token)
    assert sorted(prompt.place for group in groups for prompt in group) == list(range(len(lengths)))
    for group in groups:
        longest = max(len(prompt.ids) for prompt in group)
        assert len(group) == 1 or len(group) * (longest + new_tokens) * bytes_per_token <= 2 * 10**9
        assert len(group) <= 64


@pytest.mark.parametrize(
    "config,expected",
    [
        ({"num_hidden_layers": 64, "num_attention_heads": 40, "num_key_value_heads": 8, "hidden_size": 5120}, 524_288),
        ({"num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 32}, 2048),
    ],
)
def test_the_cache_of_a_token(config: dict[str, int], expected: int) -> None:
    """Keys and values of all layers in fp32."""
    assert cache_bytes_per_token(config, 4) == expected
    assert cache_bytes_per_token(config, 2) == expected // 2


@pytest.mark.parametrize(
    "weights,gpus,expected",
    [
        (540 * 10**6, (), 2 * 10**9),  # SmolLM2 in fp32
        (131 * 10**9, (), 32_750_000_000),  # a 32B in fp32
        (65 * 10**9, (80 * 10**9,), 10_500_000_000),
        (65 * 10**9, (40 * 10**9, 40 * 10**9), 10_500_000_000),
        (65 * 10**9, (66 * 10**9,), 2 * 10**9),
    ],
)
def test_large_models_have_more_room(weights: int, gpus: tuple[int, ...], expected: int) -> None:
    """What the weights leave of the GPUs, or a share of the weights' own size."""
    assert cache_room(weights, gpus) == pytest.approx(expected, abs=10)


# From here on with a fake replica, or a tiny Llama, and files.


@dataclass
class Place:
    """A cache of its own, and what is said."""

    folder: Path
    said: list[str] = field(default_factory=list)

    @contextmanager
    def context(self) -> Iterator[RunContext]:
        """A workshop in the folder."""
        bytecode = child_environ(os.environ)["PYTHONPYCACHEPREFIX"]
        environ = {**os.environ, "QUANTGATE_HOME": str(self.folder / "home"), "PYTHONPYCACHEPREFIX": bytecode}
        with (self.folder / "said").open("w") as stream:
            yield RunContext(self.folder, child_environ(environ), ProgressReporter(stream))
        self.said.append((self.folder / "said").read_text())

    def generate(self, base: BaseModel, count: int, *, url: str | None, new_tokens: int = 24, seed: int = 0) -> Path:
        """Self-generate from the shared rows, with four for the evaluation."""
        with self.context() as context:
            sampling = Sampling(new_tokens)
            return self_generate(base, ROWS, count, sampling=sampling, seed=seed, url=url, context=context, held_out=4)


async def test_a_replica_answers_for_the_base(tmp_path: Path) -> None:
    """Every prompt once, with a seed of its own, reasoning in front; the second time nobody is asked."""
    place, base = Place(tmp_path), read_base(write_hollow_model(tmp_path / "base"))
    async with running_fake("--fake-tokens", "6", "--fake-reasoning-tokens", "3") as fake:
        file = await asyncio.to_thread(place.generate, base, 20, url=fake.url + "/v1")
        again = await asyncio.to_thread(place.generate, base, 20, url=fake.url)
        asked = [request["body"] for request in fake.requests("/v1/chat/completions")]
    assert file == again
    assert file.parent.parent == tmp_path / "home" / "stages"
    assert [path.name for path in file.parent.parent.iterdir()] == [file.parent.name]
    assert f"self-generate: reusing {file.parent}" in place.said[1]
    assert len(asked) == 24
    assert len({body["seed"] for body in asked}) == 24
    _, rows = read_datasets([file])
    assert all(row.generated and row.completion.startswith("<think>\n") for row in rows)
    assert (len(rows), sum(map(is_held_out, rows))) == (24, 4)


async def test_another_request_is_another_file(tmp_path: Path) -> None:
    """Seed, length and number are part of its name."""
    place, base = Place(tmp_path), read_base(write_hollow_model(tmp_path / "base"))
    async with running_fake("--fake-tokens", "2") as fake:
        files = {
            await asyncio.to_thread(place.generate, base, count, url=fake.url, new_tokens=new, seed=seed)
            for count, new, seed in ((16, 24, 0), (17, 24, 0), (16, 25, 0), (16, 24, 1))
        }
    assert len(files) == 4


async def test_a_replica_that_is_full_is_asked_again(tmp_path: Path) -> None:
    """After a pause; in the end every question has its answer, in order."""
    questions = [Question((Message("user", f"{number}"),), number) for number in range(3)]
    async with running_fake("--fake-fail-first", "2", "--fake-fail-status", "503") as fake:
        replica = Replica(fake.url, concurrency=1, pause_seconds=0)
        told: list[tuple[int, int]] = []
        answers = await asyncio.to_thread(replica.answers, questions, Sampling(8), lambda *pair: told.append(pair))
        assert len(fake.requests("/v1/chat/completions")) == 5
    assert len(answers) == 3
    assert told == [(1, 3), (2, 3), (3, 3)]


async def test_a_replica_that_refuses_is_an_error_with_its_words(tmp_path: Path) -> None:
    """And none of what was generated is kept."""
    place, base = Place(tmp_path), read_base(write_hollow_model(tmp_path / "base"))
    async with running_fake("--fake-fail-first", "9", "--fake-fail-status", "400") as fake:
        with pytest.raises(RecipeError, match=rf"{fake.url}: refused to answer: 400 "):
            await asyncio.to_thread(place.generate, base, 16, url=fake.url)
        with pytest.raises(RecipeError, match=r"is no OpenAI-compatible server|refused to answer: 404"):
            await asyncio.to_thread(place.generate, base, 16, url=fake.url + "/elsewhere")
    assert not (tmp_path / "home" / "stages").exists()


def test_a_replica_that_is_not_there_is_told(tmp_path: Path) -> None:
    """With its address and a question."""
    with pytest.raises(RecipeError, match=r"http://127.0.0.1:9: can't be asked: .*; is the replica running\?"):
        Replica("http://127.0.0.1:9").answers([], Sampling(8), lambda *_: None)


@pytest.mark.real_model
@pytest.mark.timeout(300)
def test_the_base_answers_by_itself(tiny_base: Path, tmp_path: Path) -> None:
    """The same request gives the same text, one that is fit to be drawn from."""
    base = read_base(tiny_base / "tiny")
    files = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        files.append(Place(tmp_path / name).generate(base, 24, url=None))
    assert files[0].name == files[1].name
    assert files[0].read_bytes() == files[1].read_bytes()
    datasets, rows = read_datasets([files[0], tiny_base / "chats.jsonl"], [1, 0])
    split = split_records(rows, samples=64, seed=0, datasets=datasets)
    assert 16 <= len(split.calibration) <= 24
    assert all(row.generated for row in split.calibration)
    held_out = {row.sha256 for row in split.held_out}
    assert not any(row.origin in held_out for row in split.calibration)
