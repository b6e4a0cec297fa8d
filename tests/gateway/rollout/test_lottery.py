"""The lottery, the evidence of requests, and what an answer shows."""

import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.rollout.collection import MIN_FIRST_TOKENS, Collection, Outcome, read_block
from gateway.rollout.content import Content, is_looping, read_content
from gateway.rollout.evidence import MIN_VALUES, MeanAbove, Moments, mixture_rho, moments, with_value
from gateway.rollout.lottery import Draw, Lottery, conversation_hash, is_below
from gateway.rollout.progress import Progress
from serving.state.rollout_records import BlockRecord
from tests.fakes.running import ROOT
from tests.gateway.rollout.plans import NOW, plan

# Draws


@pytest.mark.parametrize("weight", [0.0, 0.01, 0.25, 0.5, 1.0])
def test_the_share_is_exact(weight: float) -> None:
    """Of 20,000 conversations the weight's share is the canary's, within a percentage point."""
    drawn = sum(is_below(conversation_hash("r-1", str(number)), weight) for number in range(20_000))
    assert drawn / 20_000 == pytest.approx(weight, abs=0.01)


def test_another_salt_draws_others() -> None:
    """Two rollouts do not try their variants on the same conversations."""
    both = sum(
        is_below(conversation_hash("r-1", str(number)), 0.25) and is_below(conversation_hash("r-2", str(number)), 0.25)
        for number in range(20_000)
    )
    assert both / 20_000 == pytest.approx(0.0625, abs=0.01)


def test_every_process_draws_alike() -> None:
    """Two gateways do not need to ask each other about a new conversation."""
    program = (
        "from gateway.rollout.lottery import Lottery; lottery = Lottery('r-1', 0.5); "
        "print(*(lottery.draw(str(number), later=False)[0].arm for number in range(50)))"
    )
    out = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True)
    lottery = Lottery("r-1", 0.5)
    assert out.stdout.split() == [lottery.draw(str(number), later=False)[0].arm for number in range(50)]


@given(st.lists(st.tuples(st.text(min_size=1, max_size=3), st.floats(0, 1)), max_size=60))
def test_a_conversation_is_drawn_once(turns: list[tuple[str, float]]) -> None:
    """Its arm is that of its first turn, whatever weights follow."""
    lottery, arms = Lottery("r-1"), dict[str, str]()
    for key, weight in turns:
        lottery.weight = weight
        draw, new = lottery.draw(key, later=key in arms)
        assert new == (key not in arms)
        assert arms.setdefault(key, draw.arm) == draw.arm


def test_a_conversation_from_before_stays() -> None:
    """A later turn without a record is stable, and no evidence; so is what the lottery could not decide."""
    lottery = Lottery("r-1", weight=0.99)
    old, _ = lottery.draw("a", later=True)
    assert (old.arm, old.counts) == ("stable", False)
    lottery.weight = 1.0
    assert lottery.draw("b", later=False)[0].counts is False
    lottery.weight = 0.0
    assert lottery.draw("c", later=False)[0].counts is False


def test_memory_is_bounded() -> None:
    """The conversations used least recently are forgotten; what was not shared does not grow either."""
    lottery = Lottery("r-1", weight=0.5, limit=10)
    for number in range(50):
        lottery.draw(str(number), later=False)
        lottery.draw("0", later=True)
    assert len(lottery) == 10
    assert len(lottery.take_unshared()) == 10
    assert lottery.draw("0", later=True)[1] is False


def test_draws_that_could_not_be_written_are_written_later() -> None:
    """A database that is away loses none."""
    lottery = Lottery("r-1", weight=0.5)
    lottery.draw("a", later=False)
    taken = lottery.take_unshared()
    assert lottery.take_unshared() == []
    lottery.put_back(taken)
    assert lottery.take_unshared() == taken


# Evidence


def test_events_count_once_per_conversation() -> None:
    """Errors come in bursts: a conversation with ten of them is one conversation; only first answers have values."""
    collection, draw = Collection(), Draw(1, "canary", 2, counts=True)
    collection.drawn(draw)
    for _ in range(10):
        collection.ended(draw, Outcome(frozenset({"errors"}), {"answer_tokens": 2.0}))
    block = collection.take_block()
    assert block is not None
    ((step, evidence),) = read_block(block, (0.01, 0.05, 0.25)).steps
    assert (step, evidence.weight, evidence.canary.conversations) == (2, 0.25, 1)
    assert evidence.canary.events == {"errors": 1}
    assert evidence.canary.values == {"answer_tokens": Moments(1, 2.0, 0.0)}
    assert collection.take_block() is None


def test_what_was_not_drawn_is_no_evidence() -> None:
    """Conversations from before the rollout belong to no arm."""
    collection, draw = Collection(), Draw(1, "stable", 0, counts=False)
    collection.drawn(draw)
    collection.ended(draw, Outcome(frozenset({"errors"})))
    assert collection.take_block() is None


def test_slow_is_what_was_slow_before() -> None:
    """The limit is the stable variant's p95 of the blocks before, the same for both arms."""
    collection = Collection()
    for number in range(MIN_FIRST_TOKENS):
        draw = Draw(number, "stable", 0, counts=True)
        collection.ended(draw, Outcome(values={"first_token_seconds": number / 100}))
    assert collection.slow_first_token is None
    collection.take_block()
    assert collection.slow_first_token == pytest.approx(0.38)
    late = Draw(999, "canary", 0, counts=True)
    collection.ended(late, Outcome(values={"first_token_seconds": 0.5}))
    assert late.events == {"slow_first_token"}


def test_a_routing_fault_is_found() -> None:
    """Shares that are not the lottery's are a mismatch; those that are, are none."""
    for canary, found in ((100, False), (250, True), (20, True)):
        progress = Progress(plan(steps=(10, 100)))
        collection = Collection()
        for number in range(1000):
            collection.drawn(Draw(number, "canary" if number < canary else "stable", 0, counts=True))
        document = collection.take_block()
        assert document is not None
        record = BlockRecord("r-1", "w", 1, NOW, document.decode())
        progress.add([record, record])
        assert progress.canary == canary
        assert bool(progress.mismatch) is found


def test_a_mean_above_its_budget() -> None:
    """The one-sample test needs some values, stays calm within the budget, and finds twice of it."""
    test = MeanAbove(0.02, mixture_rho(0.005, 0.02))
    values = [0.03, -0.03] * 100
    for budget_times, low, high in ((0.5, -50.0, 2.0), (3.0, 5.3, 1e9)):
        summary = moments([value + 0.02 * budget_times for value in values])
        assert low < MeanAbove(test.budget, test.rho, summary).log_e < high
    assert MeanAbove(0.02, test.rho, moments([9.0] * (MIN_VALUES - 1))).log_e == 0.0


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=30))
def test_moments_one_by_one(values: list[float]) -> None:
    """Welford's sums are those of the whole list."""
    summary = Moments()
    for value in values:
        summary = with_value(summary, value)
    whole = moments(values)
    assert summary.count == whole.count
    assert summary.mean == pytest.approx(whole.mean, abs=1e-9)
    assert summary.squares == pytest.approx(whole.squares, abs=1e-6)


# Content


def chunk(**delta: Any) -> bytes:
    return b"data: " + json.dumps({"choices": [{"index": 0, "delta": delta}]}).encode() + b"\n\n"


def call(arguments: str) -> dict[str, Any]:
    return {"tool_calls": [{"index": 0, "function": {"arguments": arguments}}]}


@pytest.mark.parametrize(
    "events, found",
    [
        ([{"content": "Hello"}, {"content": " there"}], set()),
        ([{"reasoning": "Hm."}, {"content": "Yes"}], set()),
        ([{"reasoning_content": "Hm."}], {"open_thinking"}),
        ([{"content": "<think>Hm."}], {"open_thinking"}),
        ([{"content": "<think>Hm.</think>Yes"}], set()),
        ([call('{"city": '), call('"Paris"}')], set()),
        ([call('{"city": ')], {"invalid_tool_call"}),
        ([call('"Paris"')], {"invalid_tool_call"}),
        ([{"content": "  \n"}], {"empty_or_looping"}),
        ([{"content": "and so on, "}] * 40, {"empty_or_looping"}),
    ],
)
def test_events_of_a_stream(events: list[dict[str, Any]], found: set[str]) -> None:
    """Deltas are joined; what is wrong with the whole is said."""
    body = b"".join(chunk(**event) for event in events) + b"data: [DONE]\n\n"
    content = read_content(body)
    assert content is not None
    assert content.events == found


def test_a_whole_answer() -> None:
    """A message has all of it at once; other JSON is not judged."""
    message = {"content": "Hi", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}
    content = read_content(json.dumps({"choices": [{"message": message}]}).encode())
    assert content == Content("Hi", "", ("{",))
    assert read_content(b'{"object": "list"}') is None
    assert read_content(b"data: nonsense\n\n") is None
    second = b'{"choices": [{"index": 1, "text": "other"}, {"index": 0, "text": "mine"}]}'
    assert read_content(second) == Content("mine")


@pytest.mark.parametrize(
    "text, loops",
    [("", False), ("a" * 119, False), ("a" * 120, True), ("abc " * 60, True), ("begin " + "x y z " * 40, True)],
)
def test_loops(text: str, loops: bool) -> None:
    """A short piece that ends a text again and again."""
    assert is_looping(text) is loops


def test_prose_is_no_loop() -> None:
    """Numbers that count up, or a table, have no period."""
    assert not is_looping(" ".join(map(str, range(500))))
    assert not is_looping("\n".join(f"| {number} | {number * 7919 % 1000} |" for number in range(100)))
