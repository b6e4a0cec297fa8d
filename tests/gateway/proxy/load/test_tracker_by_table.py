"""What is known of each replica's load, from what was sent there and from what its engine says."""

from dataclasses import replace

import pytest

from gateway.proxy.load.replica_load import InFlight
from gateway.proxy.load.tracker import LoadTracker
from gateway.routing.engine_metrics import EngineMetrics
from gateway.routing.latency import LatencyEstimate, ReplicaMetrics
from gateway.routing.speed import DEFAULT_ANSWER_TOKENS, SpeedProfile
from serving.replica import Replica

# 25 ms from token to token up to 4 at once, who get 160 tokens a second together; 1 ms for each token of a prompt.
SPEED = SpeedProfile((0.025,) * 4, (40.0, 80.0, 120.0, 160.0), 0.001, 4, answer_tokens=80.0)
ONE, TWO = (Replica(f"hi-{number}", "hi", "bf16", f"http://hi-{number}", "m1") for number in (1, 2))


class Books:
    """Loads of two replicas, on a clock that a test moves, with requests counted as the registry would."""

    def __init__(self, speeds: dict[str, SpeedProfile] | None = None) -> None:
        self.now = 100.0
        self.in_flight: dict[str, int] = {}
        self.loads = LoadTracker(self.in_flight, {"hi": SPEED} if speeds is None else speeds, lambda: self.now)
        self.loads.keep({"hi": (ONE, TWO)})

    def outlook(self, replica: Replica = ONE) -> LatencyEstimate:
        """What a replica promises."""
        return next(each for each in self.loads.outlooks("hi") if each.id == replica.id)

    def standing(self, replica: Replica = ONE) -> ReplicaMetrics:
        """What is known of it."""
        return next(each for each in self.loads.standings("hi") if each.replica.id == replica.id)

    def send(
        self, tokens: float = 100.0, cached: float = 0.0, *, streams: bool = True, replica: Replica = ONE
    ) -> InFlight:
        """Send a request there."""
        self.in_flight[replica.id] = self.in_flight.get(replica.id, 0) + 1
        return self.loads.sent(self.outlook(replica), tokens, cached, streams=streams)

    def end(self, sent: InFlight, answer_tokens: int | None = None, replica: Replica = ONE) -> None:
        """End it."""
        self.in_flight[replica.id] -= 1
        self.loads.ended(sent, answer_tokens)

    def poll(
        self, running: float | None = 0.0, waiting: float | None = 0.0, replica: Replica = ONE, **told: float
    ) -> None:
        """Have its engine say something, asked just now."""
        self.loads.polled(replica.id, self.now, EngineMetrics(self.now, running, waiting, **told))  # type: ignore[arg-type]

    def serve(self, seconds: float, first_token_seconds: float, tokens: int = 80) -> None:
        """Answer one request."""
        sent = self.send()
        self.now += first_token_seconds
        self.loads.began(sent)
        self.now += seconds - first_token_seconds
        self.end(sent, tokens)


# Who is there


@pytest.mark.parametrize(
    "ours, ended, running, waiting, others",
    [(0, 0, 5.0, 2.0, 7.0), (3, 0, 5.0, 0.0, 2.0), (3, 0, 1.0, 0.0, 0.0), (1, 2, 6.0, 0.0, 3.0)],
)
def test_others_are_those_that_are_not_ours(
    ours: int, ended: int, running: float, waiting: float, others: float
) -> None:
    """What the engine counts, less what is in flight, and less what ended while it was asked."""
    books = Books()
    sent = [books.send() for _ in range(ours + ended)]
    asked_at = books.now
    books.now += 0.5
    for each in sent[:ended]:
        books.end(each)
    books.loads.polled(ONE.id, asked_at, EngineMetrics(books.now, running, waiting))
    assert books.standing().others == others
    assert books.outlook().requests == ours + others


def test_an_ending_is_subtracted_once() -> None:
    """The next poll, asked after it, no longer counts it."""
    books = Books()
    books.end(books.send())
    books.poll(1.0)
    assert books.standing().others == 0.0
    books.now += 1.0
    books.poll(1.0)
    assert books.standing().others == 1.0


def test_what_is_in_flight_counts_at_once() -> None:
    books = Books()
    books.poll(2.0)
    sent = books.send()
    assert (books.outlook().in_flight, books.outlook().requests) == (1, 3.0)
    books.end(sent)
    assert (books.outlook().in_flight, books.outlook().requests) == (0, 2.0)


# Prompts that haven't been read


def test_a_prompt_is_unread_until_its_first_token() -> None:
    """Without what is cached; twice begun or twice ended changes nothing more."""
    books = Books()
    first, second = books.send(300.0), books.send(500.0, 400.0)
    assert books.standing().unread_tokens == 400.0
    assert books.outlook().ahead_seconds == pytest.approx(0.4)
    books.loads.began(first)
    books.loads.began(first)
    assert books.standing().unread_tokens == 100.0
    books.end(second)
    books.loads.ended(second, None)
    assert books.standing().unread_tokens == 0.0


@pytest.mark.parametrize(
    "streams, waiting, unread", [(True, 0.0, 300.0), (False, 0.0, 0.0), (False, 1.0, 100.0), (False, 9.0, 300.0)]
)
def test_a_whole_answer_is_unread_until_it_does_not_wait(streams: bool, waiting: float, unread: float) -> None:
    """Of those nobody sees a first token; whoever was sent first doesn't wait any more."""
    books = Books()
    for _ in range(3):
        books.send(streams=streams)
    books.now += 0.1
    books.poll(3.0 - min(waiting, 3.0), waiting)
    assert books.standing().unread_tokens == unread


def test_what_was_sent_since_the_question_is_not_in_the_answer() -> None:
    books = Books()
    books.send(300.0)
    books.now += 1.0
    asked_at = books.now
    books.now += 0.1
    books.send(50.0)
    books.loads.polled(ONE.id, asked_at, EngineMetrics(books.now, 1.0, 0.0))
    assert books.standing().sent_tokens == 50.0


# Polls that don't come


def test_a_replica_that_is_silent_for_a_while_is_what_it_was() -> None:
    books = Books()
    books.poll(4.0)
    books.now += 2.9
    books.loads.lost(ONE.id)
    assert (books.standing().stale, books.standing().others) == (False, 4.0)


def test_a_replica_that_is_silent_is_as_busy_as_its_siblings() -> None:
    """Or as it was when it last said something, if that is more; never idle."""
    books = Books()
    books.poll(1.0, replica=ONE)
    books.now += 3.1
    books.poll(6.0, replica=TWO)
    books.loads.lost(ONE.id)
    assert (books.outlook().stale, books.outlook().requests) == (True, 6.0)
    books.now += 1.0
    books.poll(0.0, replica=TWO)
    assert books.outlook().requests == 1.0


def test_a_replica_that_was_never_heard_of_is_as_busy_as_its_siblings() -> None:
    books = Books()
    books.poll(6.0, replica=TWO)
    books.loads.lost(ONE.id)
    assert (books.outlook().stale, books.outlook().requests) == (True, 6.0)


@pytest.mark.parametrize("running, waiting", [(None, 1.0), (1.0, None), (None, None)])
def test_a_page_that_does_not_tell_the_load_is_no_poll(running: float | None, waiting: float | None) -> None:
    """Whatever isn't there is not zero."""
    books = Books()
    books.poll(5.0)
    books.poll(running, waiting)
    assert books.standing().others == 5.0
    books.loads.polled("gone", books.now, EngineMetrics(books.now, 1.0, 1.0))
    books.loads.lost("gone")


# Who comes and goes


def test_a_replica_that_is_another_one_begins_anew() -> None:
    """Under the same name; the others keep their books, and what is left of the old one ends without a trace."""
    books = Books()
    books.poll(3.0, replica=ONE)
    books.poll(4.0, replica=TWO)
    sent = books.send()
    books.loads.keep({"hi": (replace(ONE, url="http://elsewhere"), TWO)})
    assert (books.standing().others, books.standing().unread_tokens) == (4.0, 0.0)
    assert books.standing(TWO).others == 4.0
    books.loads.began(sent)
    books.end(sent, 10)
    assert books.standing().unread_tokens == 0.0
    assert books.standing().answer_tokens == 80.0
    books.loads.keep({})
    assert not books.loads.outlooks("hi")
    assert not books.loads.standings("hi")


def test_other_measurements_count_at_once() -> None:
    books = Books({})
    assert not books.outlook().known
    books.loads.measured({"hi": SPEED})
    assert (books.outlook().known, books.outlook().token_seconds) == (True, 0.001)
    books.loads.measured({})
    assert not books.outlook().known


# What is learned


def test_answers_are_as_long_as_they_have_been() -> None:
    """A measured mix counts as ten of them; where nobody measured, the first one says it."""
    books = Books()
    for _ in range(300):
        books.end(books.send(), 200)
    assert books.standing().answer_tokens == pytest.approx(200, abs=3)
    books = Books({})
    assert books.standing().answer_tokens == DEFAULT_ANSWER_TOKENS
    books.end(books.send(), 40)
    books.end(books.send(), None)
    assert books.standing().answer_tokens == 40


def test_first_tokens_tell_how_fast_it_reads() -> None:
    """As many times slower as it is, not the root of that: what is expected is the usual, not what was learned."""
    books = Books()
    for _ in range(60):
        books.serve(1.0, 5 * 0.125)
    assert books.standing().pace.reading == pytest.approx(5, rel=0.05)


def test_the_first_token_of_one_that_had_to_wait_says_nothing() -> None:
    books = Books()
    books.poll(0.0)
    books.poll(9.0)
    sent = books.send()
    books.now += 30.0
    books.loads.began(sent)
    assert books.standing().pace.reading == 1.0


def test_polls_tell_how_fast_it_answers() -> None:
    """Of two at once 80 tokens a second are usual."""
    books = Books()
    for _ in range(2):
        books.send()
    for number in range(30):
        books.poll(2.0, generated_tokens=16.0 * number)
        books.now += 1.0
    assert books.standing().pace.answering == pytest.approx(5, rel=0.05)


def test_answers_tell_it_where_no_poll_does() -> None:
    """A measured one's slowness, and all of a speed that nobody measured."""
    books, unmeasured = Books(), Books({})
    for _ in range(20):
        books.serve(10.25, 0.125, tokens=81)
        unmeasured.serve(10.25, 0.125, tokens=81)
    books.send()
    unmeasured.send()
    assert books.outlook().answer_seconds == pytest.approx(5 * 0.025, rel=0.05)
    assert unmeasured.outlook().answer_seconds == pytest.approx(5 * 0.025, rel=0.05)


@pytest.mark.parametrize(
    "polls, slots",
    [
        ([(4.0, 2.0)], None),
        ([(4.0, 0.0), (4.0, 2.0)], None),
        ([(4.0, 2.0), (4.0, 3.0)], 4.0),
        ([(4.0, 2.0), (6.0, 3.0)], 6.0),
        ([(4.0, 2.0), (3.0, 3.0), (3.0, 0.0)], None),
    ],
)
def test_places_are_seen_only_where_a_queue_lasts(polls: list[tuple[float, float]], slots: float | None) -> None:
    """Somebody has been waiting from one look to the next, and no more were let in."""
    books = Books()
    for running, waiting in polls:
        books.poll(running, waiting)
        books.now += 1.0
    assert books.standing().observed_slots == (float("inf") if slots is None else slots)
