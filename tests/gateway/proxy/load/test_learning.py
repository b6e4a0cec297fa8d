"""What is learned of replicas while they answer, their speeds and the lengths of answers, and how it fades."""

import pytest

from gateway.proxy.load.tracker import UNMEASURED
from gateway.routing.speed import DEFAULT_ANSWER_TOKENS
from serving.replica import Replica
from tests.gateway.proxy.load.harness import ONE, TWO, LoadHarness

# Lengths of answers


def test_the_length_of_answers() -> None:
    """A measured mix counts as ten answers; without one, the first answer sets it."""
    harness = LoadHarness()
    for _ in range(300):
        harness.end(harness.send(), 200)
    assert harness.metrics().answer_tokens == pytest.approx(200, abs=3)
    harness = LoadHarness(UNMEASURED)
    assert harness.metrics().answer_tokens == DEFAULT_ANSWER_TOKENS
    harness.end(harness.send(), 40)
    harness.end(harness.send(), None)
    assert harness.metrics().answer_tokens == 40


def test_short_answers_are_learned_too() -> None:
    """The mean follows step by step."""
    harness = LoadHarness()
    for _ in range(300):
        harness.end(harness.send(10), 20)
    assert harness.estimate().answer_tokens == pytest.approx(20, abs=2)


@pytest.mark.parametrize("answer_tokens", [None, 0, -5])
def test_a_request_without_an_answer_has_no_length(answer_tokens: int | None) -> None:
    """A replica that refuses, or cannot be reached, has not given an answer of 0 tokens."""
    harness = LoadHarness()
    for _ in range(100):
        harness.end(harness.send(10), answer_tokens)
    assert harness.estimate().answer_tokens == 80


# How fast a replica reads


def test_first_tokens_tell_how_fast_a_replica_reads() -> None:
    """The slowdown is relative to the measured speed; otherwise it would converge to its square root."""
    harness = LoadHarness()
    for _ in range(60):
        harness.answer(1.0, 5 * 0.125)
    assert harness.metrics().slowdown.reading == pytest.approx(5, rel=0.05)


@pytest.mark.parametrize("slower", [0.2, 1.0, 5.0, 20.0])
def test_the_estimate_converges_to_the_real_speed(slower: float) -> None:
    """An estimate that fed back on itself would converge to its square root."""
    harness = LoadHarness()
    for _ in range(100):
        request = harness.send()
        harness.after(slower * (0.025 + 100 * 0.001))
        request.first_token()
        harness.end(request)
    assert harness.estimate().token_seconds == pytest.approx(slower * 0.001, rel=0.01)


def test_the_first_token_of_a_request_that_was_queued_is_ignored() -> None:
    """Its time is that of the queue."""
    harness = LoadHarness()
    harness.poll(0.0)
    harness.poll(9.0)
    request = harness.send()
    harness.after(30.0)
    request.first_token()
    assert harness.metrics().slowdown.reading == 1.0


def test_cached_prompts_do_not_change_the_reading_speed() -> None:
    """A first token without reading takes one step; long prompts that were read have more weight."""
    harness = LoadHarness(UNMEASURED)
    harness.answer_with_polls(ONE, first_token_seconds=0.1, tokens_per_second=40)
    for uncached in (True, False) * 20:
        request = harness.send(2000, cached=0 if uncached else 2000)
        harness.after(0.4 if uncached else 0.1)
        request.first_token()
        harness.end(request)
    assert harness.estimate().token_seconds == pytest.approx(0.4 / 2000, rel=0.5)


# How fast a replica answers


def test_polls_tell_how_fast_a_replica_answers() -> None:
    """Two requests at once get 80 tokens a second by the measurement, and 16 here."""
    harness = LoadHarness()
    for _ in range(2):
        harness.send()
    for number in range(30):
        harness.poll(2.0, generated_tokens=16.0 * number)
        harness.after(1.0)
    assert harness.metrics().slowdown.answering == pytest.approx(5, rel=0.05)


def test_answers_tell_how_fast_a_replica_without_metrics_answers() -> None:
    """They tell the slowdown of a measured replica, and the whole speed of one that is not."""
    harness, unmeasured = LoadHarness(), LoadHarness(UNMEASURED)
    for _ in range(20):
        harness.answer(10.25, 0.125, tokens=81)
        unmeasured.answer(10.25, 0.125, tokens=81)
    harness.send()
    unmeasured.send()
    assert harness.estimate().answer_seconds == pytest.approx(5 * 0.025, rel=0.05)
    assert unmeasured.estimate().answer_seconds == pytest.approx(5 * 0.025, rel=0.05)


def test_an_engine_that_reads_has_not_stalled() -> None:
    """An engine that reads a long prompt generates nothing for a while; after ten seconds it counts as stalled."""
    harness = LoadHarness()
    request = harness.send(3000)
    for _ in range(12):
        harness.after(0.25).poll(1, generated_tokens=0)
    assert harness.estimate().answer_seconds == pytest.approx(0.025)
    for _ in range(60):
        harness.after(0.25).poll(1, generated_tokens=0)
    assert harness.estimate().answer_seconds > 0.1
    harness.end(request, 1)


# How it fades


def stall(harness: LoadHarness, replica: Replica = ONE) -> None:
    """Have a replica generate nothing for ten seconds after its first token."""
    request = harness.send(10, replica=replica)
    request.first_token()
    for _ in range(40):
        harness.after(0.25).poll(1, generated_tokens=0, replica=replica)
    harness.end(request, 1, replica)


def rest(harness: LoadHarness, seconds: int) -> None:
    """Let both replicas be idle."""
    for _ in range(seconds):
        harness.after(1)
        for replica in (ONE, TWO):
            harness.poll(generated_tokens=1000, replica=replica)


def test_the_slowdown_of_an_idle_replica_fades() -> None:
    """Otherwise it would get no more requests, and nothing could show that it is as fast as before."""
    harness = LoadHarness()
    stall(harness)
    assert harness.estimate().answer_seconds > 10 * harness.estimate(TWO).answer_seconds
    rest(harness, 60)
    assert harness.estimate().answer_seconds < 4 * harness.estimate(TWO).answer_seconds
    rest(harness, 600)
    assert harness.estimate().answer_seconds == pytest.approx(harness.estimate(TWO).answer_seconds, rel=0.01)


def test_the_learned_speed_of_an_idle_replica_fades() -> None:
    """Without a measurement it approaches what the replicas of the variant have shown together."""
    harness = LoadHarness(UNMEASURED)
    for _ in range(10):
        harness.answer_with_polls(TWO, first_token_seconds=0.1, tokens_per_second=40)
    harness.answer_with_polls(ONE, first_token_seconds=5.0, tokens_per_second=1)
    assert harness.estimate().answer_seconds > 10 * harness.estimate(TWO).answer_seconds
    for _ in range(100):
        harness.answer_with_polls(TWO, first_token_seconds=0.1, tokens_per_second=40)
        harness.poll(generated_tokens=0)
    for figure in ("answer_seconds", "token_seconds"):
        assert getattr(harness.estimate(), figure) < 1.5 * getattr(harness.estimate(TWO), figure)
