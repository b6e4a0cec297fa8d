"""The load of replicas: what is counted in is counted out, and polls correct what the gateway cannot see."""

from dataclasses import replace
from math import inf

import pytest

from gateway.proxy.load.tracker import UNMEASURED
from gateway.routing.engine_metrics import EngineMetrics
from tests.gateway.proxy.load.harness import MEASURED, ONE, TWO, LoadHarness

# Requests


@pytest.mark.parametrize(
    "ours, ended, running, waiting, others",
    [(0, 0, 5.0, 2.0, 7.0), (3, 0, 5.0, 0.0, 2.0), (3, 0, 1.0, 0.0, 0.0), (1, 2, 6.0, 0.0, 3.0)],
)
def test_requests_of_others(ours: int, ended: int, running: float, waiting: float, others: float) -> None:
    """Those that the engine counts, less those in flight, less those that ended while the poll was under way."""
    harness = LoadHarness()
    requests = [harness.send() for _ in range(ours + ended)]
    polled_at = harness.now
    harness.after(0.5)
    for request in requests[:ended]:
        harness.end(request, None)
    harness.poll(running, waiting, polled_at=polled_at)
    assert harness.metrics().others == others
    assert harness.estimate().requests == ours + others


def test_an_end_is_subtracted_once() -> None:
    """The next poll, sent after the end, does not count the request any more."""
    harness = LoadHarness()
    harness.end(harness.send(), None)
    harness.poll(1.0)
    assert harness.metrics().others == 0.0
    harness.after(1.0).poll(1.0)
    assert harness.metrics().others == 1.0


def test_many_short_answers_are_not_requests_of_others() -> None:
    """All those that ended since the engine counted are subtracted."""
    harness = LoadHarness()
    for request in [harness.send(1) for _ in range(600)]:
        harness.end(request, 1)
    harness.after(0.05).poll(600)
    assert harness.estimate().requests == 0


def test_requests_in_flight_count_at_once() -> None:
    """They count from the step in which they are sent to the step in which they end."""
    harness = LoadHarness()
    harness.poll(2.0)
    request = harness.send()
    assert (harness.estimate().in_flight, harness.estimate().requests) == (1, 3.0)
    harness.end(request, None)
    assert (harness.estimate().in_flight, harness.estimate().requests) == (0, 2.0)


# Unread prompts


def test_a_prompt_is_unread_until_its_first_token() -> None:
    """Or until its end; cached tokens never count, and a second first token or end changes nothing."""
    harness = LoadHarness()
    first, second = harness.send(300.0), harness.send(500.0, cached=400.0)
    assert harness.metrics().unread_tokens == 400.0
    assert harness.estimate().ahead_seconds == pytest.approx(0.4)
    first.first_token()
    first.first_token()
    assert harness.metrics().unread_tokens == 100.0
    assert harness.unread_tokens() == pytest.approx(100)
    harness.end(second, None)
    harness.load.end(second, None)
    assert harness.metrics().unread_tokens == 0.0
    harness.end(first)
    assert harness.estimate().requests == 0


def test_an_end_that_comes_before_the_first_token() -> None:
    """An end with an answer's length reads the prompt, too, and counts once."""
    harness = LoadHarness()
    first, second = harness.send(100), harness.send(50)
    assert harness.unread_tokens() == pytest.approx(150)
    first.first_token()
    first.first_token()
    assert harness.unread_tokens() == pytest.approx(50)
    harness.end(second)
    harness.load.end(second, 80)
    assert harness.unread_tokens() == 0
    harness.end(first)
    assert harness.estimate().requests == 0


@pytest.mark.parametrize(
    "streams, waiting, unread", [(True, 0.0, 300.0), (False, 0.0, 0.0), (False, 1.0, 100.0), (False, 9.0, 300.0)]
)
def test_a_unary_prompt_is_unread_while_it_waits(streams: bool, waiting: float, unread: float) -> None:
    """First tokens of unary answers are not visible: those sent first count as read, except as many as wait."""
    harness = LoadHarness()
    for _ in range(3):
        harness.send(streams=streams)
    harness.after(0.1).poll(3.0 - min(waiting, 3.0), waiting)
    assert harness.metrics().unread_tokens == unread


def test_unary_prompts_are_read_when_they_no_longer_wait() -> None:
    """Each poll that was sent after them shows how many cannot have been read yet."""
    harness = LoadHarness()
    requests = [harness.send(streams=False) for _ in range(3)]
    harness.after(1).poll(1, 2)
    assert harness.unread_tokens() == pytest.approx(200)
    harness.after(1).poll(3)
    assert harness.unread_tokens() == 0
    for request in requests:
        harness.end(request)


def test_unary_prompts_of_a_replica_without_metrics() -> None:
    """They count as read after a while; otherwise they would be unread until they end."""
    harness = LoadHarness()
    requests = [harness.send(streams=False), harness.send()]
    harness.after(1).load.poll_failed(ONE.id)
    assert harness.unread_tokens() == pytest.approx(200)
    harness.after(3).load.poll_failed(ONE.id)
    assert harness.unread_tokens() == pytest.approx(100)
    for request in requests:
        harness.end(request)


def test_tokens_sent_since_a_poll() -> None:
    """A poll says nothing about a request that was sent after it."""
    harness = LoadHarness()
    harness.send(300.0)
    polled_at = harness.after(1.0).now
    harness.after(0.1).send(50.0)
    harness.poll(1.0, polled_at=polled_at)
    assert harness.metrics().sent_tokens == 50.0


# Polls that fail


def test_a_poll_is_valid_for_a_while() -> None:
    """A failure within three seconds of the last poll changes nothing."""
    harness = LoadHarness()
    harness.poll(4.0)
    harness.after(2.9).load.poll_failed(ONE.id)
    assert (harness.metrics().stale, harness.metrics().others) == (False, 4.0)


def test_a_stale_replica_is_as_busy_as_its_siblings() -> None:
    """Or as busy as at its last poll, if that is more; never idle."""
    harness = LoadHarness()
    harness.poll(1.0, replica=ONE)
    harness.after(3.1).poll(6.0, replica=TWO)
    harness.load.poll_failed(ONE.id)
    assert (harness.estimate().stale, harness.estimate().requests) == (True, 6.0)
    harness.after(1.0).poll(0.0, replica=TWO)
    assert harness.estimate().requests == 1.0


def test_a_replica_that_was_never_polled_is_as_busy_as_its_siblings() -> None:
    """It is stale from the beginning."""
    harness = LoadHarness()
    harness.poll(6.0, replica=TWO)
    harness.load.poll_failed(ONE.id)
    assert (harness.estimate().stale, harness.estimate().requests) == (True, 6.0)


@pytest.mark.parametrize("running, waiting", [(None, 1.0), (1.0, None), (None, None)])
def test_a_poll_that_does_not_tell_the_load_is_ignored(running: float | None, waiting: float | None) -> None:
    """A missing value is not zero; polls of replicas that are not ready are ignored, too."""
    harness = LoadHarness()
    harness.poll(5.0)
    harness.poll(running, waiting)
    assert harness.metrics().others == 5.0
    harness.load.polled("gone", harness.now, EngineMetrics(harness.now, 1.0, 1.0))
    harness.load.poll_failed("gone")


# Replicas that come and go


def test_a_replica_that_differs_starts_anew() -> None:
    """Even under the same id; the others keep their loads, and requests to the old one end without a trace."""
    harness = LoadHarness()
    harness.poll(3.0, replica=ONE)
    harness.poll(4.0, replica=TWO)
    request = harness.send()
    harness.keep_only(replace(ONE, url="http://elsewhere"), TWO)
    assert (harness.metrics().others, harness.metrics().unread_tokens) == (4.0, 0.0)
    assert harness.metrics(TWO).others == 4.0
    request.first_token()
    harness.end(request, 10)
    assert harness.metrics().unread_tokens == 0.0
    assert harness.metrics().answer_tokens == 80.0
    harness.keep_only()
    assert not harness.load.estimates("hi")
    assert not harness.load.replica_metrics("hi")


def test_requests_outlive_the_load_of_their_replica() -> None:
    """A replica that leaves and comes back has the requests that it had, and nothing unread; their ends change that."""
    harness = LoadHarness(MEASURED)
    old = harness.send()
    harness.keep_only(TWO)
    harness.keep_only(ONE, TWO)
    assert (harness.estimate().in_flight, harness.estimate().ahead_seconds) == (1, 0)
    harness.end(old)
    assert harness.estimate().in_flight == 0
    old = harness.send()
    harness.keep_only(TWO)
    harness.keep_only(ONE, TWO)
    new = harness.send(40)
    old.first_token()
    harness.end(old)
    assert harness.estimate().in_flight == 1
    assert harness.unread_tokens() == pytest.approx(40)
    harness.end(new)
    assert (harness.estimate().in_flight, harness.unread_tokens()) == (0, 0)


def test_requests_end_while_no_replica_is_ready() -> None:
    """First tokens, ends and polls of a replica that has left are ignored."""
    harness = LoadHarness()
    request = harness.send()
    harness.keep_only()
    request.first_token()
    harness.end(request)
    harness.poll()
    harness.load.poll_failed(ONE.id)
    assert harness.load.estimates("hi") == ()


# Slots


@pytest.mark.parametrize(
    "polls, slots",
    [
        ([(4.0, 2.0)], inf),
        ([(4.0, 0.0), (4.0, 2.0)], inf),
        ([(4.0, 2.0), (4.0, 3.0)], 4.0),
        ([(4.0, 2.0), (6.0, 3.0)], 6.0),
        ([(4.0, 2.0), (3.0, 3.0), (3.0, 0.0)], inf),
    ],
)
def test_slots_are_observed_only_while_requests_wait(polls: list[tuple[float, float]], slots: float) -> None:
    """Requests have to wait at two polls in a row; slots are the most that ran."""
    harness = LoadHarness()
    for running, waiting in polls:
        harness.poll(running, waiting)
        harness.after(1.0)
    assert harness.metrics().observed_slots == slots


# Measurements


def test_new_measurements_count_at_once() -> None:
    """A replica whose variant has no measurement any more has no known speed."""
    harness = LoadHarness(UNMEASURED)
    assert not harness.estimate().known
    harness.load.set_speeds(MEASURED)
    assert (harness.estimate().known, harness.estimate().token_seconds) == (True, 0.001)
    harness.load.set_speeds({})
    assert not harness.estimate().known
