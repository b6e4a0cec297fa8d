"""Latency estimates: what one more request would cost on a replica, in seconds."""

from dataclasses import replace as replaced

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.schema import NO_FLOOR
from gateway.routing.engine_metrics import EngineMetrics
from gateway.routing.latency import LatencyEstimate, ReplicaMetrics, estimate_latency, kv_usage
from gateway.routing.request import RoutingRequest
from gateway.routing.score import cost, expected_answer_tokens
from gateway.routing.speed import Slowdown, SpeedProfile
from gateway.routing.target import Target
from serving.replica import Replica

REPLICA = Replica("hi-1", "hi", "bf16", "http://hi-1", "m1")
# Up to 4 requests at once: 25 ms per token, 160 tokens per second together; 1 ms per token of a prompt.
SPEED = SpeedProfile((0.025,) * 4, (40.0, 80.0, 120.0, 160.0), 0.001, 4, answer_tokens=80.0, kv_capacity_tokens=1000)
IDLE = ReplicaMetrics(REPLICA, poll=EngineMetrics(0.0, 0.0, 0.0, 0.0), stale=False, speed=SPEED, answer_tokens=80.0)
FIGURES = ("queue_seconds", "ahead_seconds", "kv_seconds", "wait_seconds", "token_seconds", "answer_seconds")


REQUEST = RoutingRequest(Target("smol", (), NO_FLOOR, pinned=False), ())


def metrics(**changes: object) -> ReplicaMetrics:
    """The metrics of an idle replica with some fields changed."""
    return msgspec.structs.replace(IDLE, **changes)


def request(**fields: object) -> RoutingRequest:
    """A request with these fields."""
    return msgspec.structs.replace(REQUEST, **fields)


def test_an_idle_replica() -> None:
    """On an idle replica a request costs reading and answering only, less what is cached."""
    idle = estimate_latency(IDLE)
    assert [getattr(idle, name) for name in FIGURES] == pytest.approx([0, 0, 0, 0, 0.001, 0.025])
    assert idle.has_room
    assert cost(idle, request(prompt_tokens=100.0)) == pytest.approx(0.025 + 0.1 + 2.0)
    for cached_tokens, reading_seconds in ((0.0, 0.1), (60.0, 0.04), (500.0, 0.0)):
        cached = request(prompt_tokens=100.0, cached_tokens={"hi-1": cached_tokens})
        assert cost(idle, cached) == pytest.approx(0.025 + reading_seconds + 2.0)


@pytest.mark.parametrize(
    "changes, queue_seconds",
    [
        ({"in_flight": 3}, 0.0),
        # Two answers of 80 tokens end per second: one more request waits for half a second.
        ({"in_flight": 4}, 0.5),
        ({"in_flight": 8}, 2.5),
        ({"in_flight": 2, "others": 2.0}, 0.5),
        ({"in_flight": 4, "slowdown": Slowdown(answering=5.0)}, 2.5),
        # Observed slots: two run while others wait, at the rate of two.
        ({"in_flight": 3, "observed_slots": 2.0}, 2 * 80 / 80),
        ({"in_flight": 99, "speed": msgspec.structs.replace(SPEED, slots=None)}, 0.0),
        # Two run in a full cache and one waits for room in it; if the cache is not full, it waits to be read.
        ({"in_flight": 3, "poll": EngineMetrics(0.0, running=2, waiting=1, kv_usage=0.9)}, 2 * 80 / 80),
        ({"in_flight": 3, "poll": EngineMetrics(0.0, running=2, waiting=1, kv_usage=0.9), "stale": True}, 0.0),
        ({"in_flight": 3, "poll": EngineMetrics(0.0, running=2, waiting=1, kv_usage=0.5)}, 0.0),
    ],
)
def test_the_queue(changes: dict[str, object], queue_seconds: float) -> None:
    """A request beyond the slots waits for answers to end, at the rate at which they end."""
    assert estimate_latency(metrics(**changes)).queue_seconds == pytest.approx(queue_seconds)


def test_answers_count_as_one_token_at_least() -> None:
    """A mean length of zero, which is never learned, does not divide by zero."""
    assert estimate_latency(metrics(in_flight=8, answer_tokens=0.0)).queue_seconds == pytest.approx(5 / 160)


def test_prompts_ahead() -> None:
    """Prompts sent before are read first, at the observed slowdown."""
    assert estimate_latency(metrics(unread_tokens=500.0)).ahead_seconds == pytest.approx(0.5)
    slow = Slowdown(expected=1.0, observed=3.0)
    assert estimate_latency(metrics(unread_tokens=500.0, slowdown=slow)).ahead_seconds == pytest.approx(1.5)


@pytest.mark.parametrize("unread_tokens, ahead_seconds", [(0.0, 0.0), (2000.0, 0.0), (4000.0, 1.5)])
def test_prompts_ahead_are_read_during_the_queue(unread_tokens: float, ahead_seconds: float) -> None:
    """The rate of answers includes reading prompts, so only the excess over the queue counts."""
    full = estimate_latency(metrics(in_flight=8, unread_tokens=unread_tokens))
    assert full.queue_seconds == pytest.approx(2.5)
    assert full.ahead_seconds == pytest.approx(ahead_seconds)
    assert full.wait_seconds == pytest.approx(2.5 + ahead_seconds)


@pytest.mark.parametrize(
    "usage, seconds", [(None, 0.0), (0.0, 0.0), (0.5, 0.0), (0.75, 0.15), (0.9, 0.6), (0.99, 7.35), (1.0, 74.85)]
)
def test_kv_barrier(usage: float | None, seconds: float) -> None:
    """The term grows steeply as the cache fills; an unknown usage adds nothing."""
    assert estimate_latency(metrics(poll=EngineMetrics(0.0, 0, 0, usage))).kv_seconds == pytest.approx(seconds)


def test_tokens_sent_since_the_poll_count_as_cached() -> None:
    """They are a share of the polled capacity, or else of the measured one; a stale poll gives no usage."""
    poll = EngineMetrics(0.0, 0, 0, kv_usage=0.5, kv_capacity_tokens=2000)
    assert kv_usage(metrics(poll=poll, sent_tokens=500.0)) == pytest.approx(0.75)
    assert kv_usage(metrics(poll=EngineMetrics(0.0, 0, 0, 0.5), sent_tokens=250.0)) == pytest.approx(0.75)
    assert kv_usage(metrics(poll=poll, sent_tokens=9e9)) == 1.0
    assert kv_usage(metrics(poll=poll, stale=True)) is None


@pytest.mark.parametrize(
    "in_flight, others, sent_requests, usage",
    [(4, 0.0, 0, 0.8), (2, 0.0, 0, 0.4), (0, 0.0, 0, 0.0), (2, 2.0, 0, 0.8), (4, 0.0, 3, 0.2), (9, 0.0, 0, 0.8)],
)
def test_requests_that_ended_since_the_poll_leave_the_cache(
    in_flight: int, others: float, sent_requests: int, usage: float
) -> None:
    """Of four requests that ran at the poll, the share that is still there holds its share of the cache."""
    poll = EngineMetrics(0.0, running=4, waiting=0, kv_usage=0.8)
    after = metrics(poll=poll, in_flight=in_flight, others=others, sent_requests=sent_requests)
    assert kv_usage(after) == pytest.approx(usage)


def test_unknown_speed() -> None:
    """Without a speed only the number of requests is known."""
    estimate = estimate_latency(metrics(speed=None, in_flight=3, others=2.0))
    assert (estimate.known, estimate.requests, estimate.in_flight, estimate.wait_seconds) == (False, 5.0, 3, 0.0)


def test_room_and_context() -> None:
    """Room ends at `max_in_flight`; a request surely needs 70 % of its estimated prompt and its answer limit."""
    small = replaced(REPLICA, max_in_flight=2, max_model_len_tokens=4096)
    assert estimate_latency(metrics(replica=small, in_flight=1)).has_room
    assert not estimate_latency(metrics(replica=small, in_flight=2)).has_room
    assert estimate_latency(metrics(replica=small)).context_tokens == 4096
    assert estimate_latency(metrics(replica=small)).max_in_flight == 2
    assert estimate_latency(metrics(replica=small, speed=None)).max_in_flight == 2
    assert request(prompt_tokens=1000.0, answer_tokens=500).needed_tokens == pytest.approx(1200)


def test_expected_answer_tokens() -> None:
    """The usual length, or less if the client limits it."""
    idle = estimate_latency(IDLE)
    assert [expected_answer_tokens(idle, request(answer_tokens=limit)) for limit in (None, 16, 4096)] == [80, 16, 80]


any_metrics = st.builds(
    ReplicaMetrics,
    st.just(REPLICA),
    in_flight=st.integers(0, 600),
    others=st.floats(0, 100),
    unread_tokens=st.floats(0, 1e5),
    sent_tokens=st.floats(0, 1e5),
    poll=st.none() | st.builds(EngineMetrics, st.just(0.0), kv_usage=st.none() | st.floats(0, 1)),
    stale=st.booleans(),
    observed_slots=st.floats(1, 100) | st.just(float("inf")),
    slowdown=st.builds(Slowdown, st.floats(0.02, 50), st.just(1.0), st.floats(0.02, 50)),
    speed=st.none() | st.just(SPEED),
    answer_tokens=st.floats(1, 1e4),
)


@given(any_metrics)
def test_one_more_request_never_shortens_a_wait(before_metrics: ReplicaMetrics) -> None:
    """All terms are finite and not negative; one more request shrinks none of them except `ahead`."""
    before = estimate_latency(before_metrics)
    more = msgspec.structs.replace(
        before_metrics,
        in_flight=before_metrics.in_flight + 1,
        unread_tokens=before_metrics.unread_tokens + 10,
        sent_tokens=before_metrics.sent_tokens + 10,
    )
    after = estimate_latency(more)
    for name in (*FIGURES, "fixed_seconds", "step_seconds", "requests"):
        least = 0 if name == "ahead_seconds" else getattr(before, name)
        assert 0 <= getattr(before, name) < float("inf"), name
        assert least <= getattr(after, name) * (1 + 1e-9), name


def test_an_estimate_survives_json() -> None:
    """An estimate can be encoded and decoded, so a decision can be explained later."""
    estimate = estimate_latency(metrics(in_flight=5))
    assert msgspec.json.decode(msgspec.json.encode(estimate), type=LatencyEstimate) == estimate
