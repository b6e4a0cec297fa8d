"""What a replica can promise, in seconds."""

from dataclasses import replace as replaced

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.routing.engine_metrics import EngineMetrics
from gateway.routing.latency import (
    LatencyEstimate,
    ReplicaMetrics,
    answer_length,
    estimate_latency,
    kv_usage,
    seconds_for,
)
from gateway.routing.request import Ask, needed_tokens
from gateway.routing.speed import Slowdown, SpeedProfile
from serving.replica import Replica

REPLICA = Replica("hi-1", "hi", "bf16", "http://hi-1", "m1")
# 25 ms from token to token up to 4 at once, who get 160 tokens a second together; 1 ms for each token of a prompt.
SPEED = SpeedProfile((0.025,) * 4, (40.0, 80.0, 120.0, 160.0), 0.001, 4, answer_tokens=80.0, kv_capacity_tokens=1000)
IDLE = ReplicaMetrics(REPLICA, poll=EngineMetrics(0.0, 0.0, 0.0, 0.0), stale=False, speed=SPEED, answer_tokens=80.0)
FIGURES = ("queue_seconds", "ahead_seconds", "kv_seconds", "wait_seconds", "token_seconds", "answer_seconds")


def standing(**changes: object) -> ReplicaMetrics:
    """The idle one with some of it changed."""
    return msgspec.structs.replace(IDLE, **changes)


def test_an_idle_replica() -> None:
    """Nothing to wait for: reading and answering are all it costs."""
    idle = estimate_latency(IDLE)
    assert [getattr(idle, name) for name in FIGURES] == pytest.approx([0, 0, 0, 0, 0.001, 0.025])
    assert idle.has_room
    assert seconds_for(idle, Ask(prompt_tokens=100), 80, 0) == pytest.approx(0.025 + 0.1 + 2.0)
    assert seconds_for(idle, Ask(prompt_tokens=100), 80, 60) == pytest.approx(0.025 + 0.04 + 2.0)
    assert seconds_for(idle, Ask(prompt_tokens=100), 80, 500) == pytest.approx(0.025 + 2.0)


@pytest.mark.parametrize(
    "changes, queue_seconds",
    [
        ({"in_flight": 3}, 0.0),
        # Two answers of 80 tokens end in a second: one more waits for half of one.
        ({"in_flight": 4}, 0.5),
        ({"in_flight": 8}, 2.5),
        ({"in_flight": 2, "others": 2.0}, 0.5),
        ({"in_flight": 4, "pace": Slowdown(answering=5.0)}, 2.5),
        # It runs no more than two although others wait: all together get what two get.
        ({"in_flight": 3, "observed_slots": 2.0}, 2 * 80 / 80),
        ({"in_flight": 99, "speed": msgspec.structs.replace(SPEED, slots=None)}, 0.0),
        # Two run in a cache that is full, and one waits for room in it; in one that isn't, it waits to be read.
        ({"in_flight": 3, "poll": EngineMetrics(0.0, running=2, waiting=1, kv_usage=0.9)}, 2 * 80 / 80),
        ({"in_flight": 3, "poll": EngineMetrics(0.0, running=2, waiting=1, kv_usage=0.9), "stale": True}, 0.0),
        ({"in_flight": 3, "poll": EngineMetrics(0.0, running=2, waiting=1, kv_usage=0.5)}, 0.0),
    ],
)
def test_the_queue(changes: dict[str, object], queue_seconds: float) -> None:
    """Whoever finds no place waits until so many answers have ended, at the rate at which they end."""
    assert estimate_latency(standing(**changes)).queue_seconds == pytest.approx(queue_seconds)


def test_answers_of_no_length_end_no_faster_than_they_begin() -> None:
    """A mean of zero tokens, which learning never comes to, would be no rate at all."""
    assert estimate_latency(standing(in_flight=8, answer_tokens=0.0)).queue_seconds == pytest.approx(5 / 160)


def test_prompts_ahead() -> None:
    """They are read first, as slowly as the replica has been reading."""
    assert estimate_latency(standing(unread_tokens=500.0)).ahead_seconds == pytest.approx(0.5)
    slow = Slowdown(expected=1.0, observed=3.0)
    assert estimate_latency(standing(unread_tokens=500.0, pace=slow)).ahead_seconds == pytest.approx(1.5)


@pytest.mark.parametrize("unread_tokens, ahead_seconds", [(0.0, 0.0), (2000.0, 0.0), (4000.0, 1.5)])
def test_prompts_are_read_while_one_waits_for_a_place(unread_tokens: float, ahead_seconds: float) -> None:
    """Answers end at a rate that was measured with prompts read in between: only what is left then comes on top."""
    full = estimate_latency(standing(in_flight=8, unread_tokens=unread_tokens))
    assert full.queue_seconds == pytest.approx(2.5)
    assert full.ahead_seconds == pytest.approx(ahead_seconds)
    assert full.wait_seconds == pytest.approx(2.5 + ahead_seconds)


@pytest.mark.parametrize(
    "usage, seconds", [(None, 0.0), (0.0, 0.0), (0.5, 0.0), (0.75, 0.15), (0.9, 0.6), (0.99, 7.35), (1.0, 74.85)]
)
def test_the_barrier_of_the_kv_cache(usage: float | None, seconds: float) -> None:
    """It grows without end as the cache fills; what isn't known is no barrier."""
    assert estimate_latency(standing(poll=EngineMetrics(0.0, 0, 0, usage))).kv_seconds == pytest.approx(seconds)


def test_what_was_sent_since_the_poll_fills_the_cache() -> None:
    """In the tokens that the engine's cache holds, or else in those that were measured; an old poll says nothing."""
    poll = EngineMetrics(0.0, 0, 0, kv_usage=0.5, kv_capacity_tokens=2000)
    assert kv_usage(standing(poll=poll, sent_tokens=500.0)) == pytest.approx(0.75)
    assert kv_usage(standing(poll=EngineMetrics(0.0, 0, 0, 0.5), sent_tokens=250.0)) == pytest.approx(0.75)
    assert kv_usage(standing(poll=poll, sent_tokens=9e9)) == 1.0
    assert kv_usage(standing(poll=poll, stale=True)) is None


@pytest.mark.parametrize(
    "in_flight, others, sent_requests, usage",
    [(4, 0.0, 0, 0.8), (2, 0.0, 0, 0.4), (0, 0.0, 0, 0.0), (2, 2.0, 0, 0.8), (4, 0.0, 3, 0.2), (9, 0.0, 0, 0.8)],
)
def test_what_has_ended_since_the_poll_is_out_of_the_cache(
    in_flight: int, others: float, sent_requests: int, usage: float
) -> None:
    """Four ran when the engine was asked: of what they held, as much is left as of them."""
    poll = EngineMetrics(0.0, running=4, waiting=0, kv_usage=0.8)
    now = standing(poll=poll, in_flight=in_flight, others=others, sent_requests=sent_requests)
    assert kv_usage(now) == pytest.approx(usage)


def test_without_a_speed_nothing_is_in_seconds() -> None:
    """Only how many requests there are is known."""
    told = estimate_latency(standing(speed=None, in_flight=3, others=2.0))
    assert (told.known, told.requests, told.in_flight, told.wait_seconds) == (False, 5.0, 3, 0.0)


def test_room_and_context() -> None:
    """More than it may have at once are not sent to it, nor what surely doesn't fit."""
    small = replaced(REPLICA, max_in_flight=2, max_model_len_tokens=4096)
    assert estimate_latency(standing(replica=small, in_flight=1)).has_room
    assert not estimate_latency(standing(replica=small, in_flight=2)).has_room
    assert estimate_latency(standing(replica=small)).context_tokens == 4096
    assert needed_tokens(Ask(prompt_tokens=1000, answer_tokens=500)) == pytest.approx(1200)


def test_how_long_an_answer_is_expected_to_be() -> None:
    """As long as usual, but no longer than the client wants it."""
    idle = estimate_latency(IDLE)
    assert [answer_length(idle, Ask(answer_tokens=most)) for most in (None, 16, 4096)] == [80, 16, 80]


standings = st.builds(
    ReplicaMetrics,
    st.just(REPLICA),
    in_flight=st.integers(0, 600),
    others=st.floats(0, 100),
    unread_tokens=st.floats(0, 1e5),
    sent_tokens=st.floats(0, 1e5),
    poll=st.none() | st.builds(EngineMetrics, st.just(0.0), kv_usage=st.none() | st.floats(0, 1)),
    stale=st.booleans(),
    observed_slots=st.floats(1, 100) | st.just(float("inf")),
    pace=st.builds(Slowdown, st.floats(0.02, 50), st.just(1.0), st.floats(0.02, 50)),
    speed=st.none() | st.just(SPEED),
    answer_tokens=st.floats(1, 1e4),
)


@given(standings)
def test_more_to_do_is_never_better(given: ReplicaMetrics) -> None:
    """Every term is a number and not negative, and no wait shrinks when a request comes; prompts ahead may."""
    before = estimate_latency(given)
    more = msgspec.structs.replace(
        given, in_flight=given.in_flight + 1, unread_tokens=given.unread_tokens + 10, sent_tokens=given.sent_tokens + 10
    )
    after = estimate_latency(more)
    for name in (*FIGURES, "fixed_seconds", "step_seconds", "requests"):
        least = 0 if name == "ahead_seconds" else getattr(before, name)
        assert 0 <= getattr(before, name) < float("inf"), name
        assert least <= getattr(after, name) * (1 + 1e-9), name


def test_an_outlook_is_plain() -> None:
    """It can be written down and read again, so that a decision can be explained later."""
    told = estimate_latency(standing(in_flight=5))
    assert msgspec.json.decode(msgspec.json.encode(told), type=LatencyEstimate) == told
