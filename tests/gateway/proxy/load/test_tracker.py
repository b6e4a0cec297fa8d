"""What is known of each replica's load: what is counted up is counted down, and what is learnt is forgotten again."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from gateway.proxy.load.replica_load import InFlight
from gateway.proxy.load.tracker import UNMEASURED, LoadTracker
from gateway.routing.engine_metrics import EngineMetrics
from gateway.routing.latency import LatencyEstimate
from gateway.routing.speed import SpeedProfile
from serving.replica import Replica

SPEED = SpeedProfile((0.025,) * 4, (40.0, 80.0, 120.0, 160.0), 0.001, 4, answer_tokens=80.0, kv_capacity_tokens=10_000)
MEASURED = {"hi": SPEED}


def replica(name: str, url: str = "") -> Replica:
    """One of the variant `hi`."""
    return Replica(name, "hi", "any", url or f"http://{name}", "m1", max_in_flight=1000)


@dataclass
class Books:
    """Loads, with a registry's count and a clock that the test moves."""

    speeds: Mapping[str, SpeedProfile] = field(default_factory=lambda: UNMEASURED)
    now: float = 0.0
    in_flight: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.loads = LoadTracker(self.in_flight, self.speeds, lambda: self.now)
        self.keep("hi-0", "hi-1")

    def keep(self, *names: str) -> None:
        """Have these be ready."""
        self.loads.keep({"hi": tuple(map(replica, names))} if names else {})

    def outlook(self, name: str = "hi-0") -> LatencyEstimate:
        """What a replica promises."""
        return next(each for each in self.loads.outlooks("hi") if each.id == name)

    def send(self, tokens: float = 10.0, *, cached: float = 0.0, streams: bool = True, name: str = "hi-0") -> InFlight:
        """Send a request."""
        sent = self.loads.sent(self.outlook(name), tokens, cached, streams=streams)
        self.in_flight[name] = self.in_flight.get(name, 0) + 1
        return sent

    def end(self, sent: InFlight, answer_tokens: int | None = 80, name: str = "hi-0") -> None:
        """End one."""
        self.in_flight[name] -= 1
        if not self.in_flight[name]:
            del self.in_flight[name]
        self.loads.ended(sent, answer_tokens)

    def poll(self, running: float = 0, waiting: float = 0, generated: float = 0, name: str = "hi-0") -> None:
        """Have an engine say how it is, now."""
        self.loads.polled(name, self.now, EngineMetrics(self.now, running, waiting, 0.0, None, 0.0, generated))

    def after(self, seconds: float) -> "Books":
        """Let time pass."""
        self.now += seconds
        return self


def unread(books: Books, name: str = "hi-0") -> float:
    """Tokens that wait to be read, by the seconds that they take."""
    return books.outlook(name).ahead_seconds / books.outlook(name).token_seconds


# Counting up and down


def test_what_is_sent_is_read_once() -> None:
    """By its first token, or by its end; a second word of either changes nothing."""
    books = Books(MEASURED)
    first, second = books.send(100), books.send(50)
    assert unread(books) == pytest.approx(150)
    books.loads.began(first)
    books.loads.began(first)
    assert unread(books) == pytest.approx(50)
    books.end(second)
    books.loads.ended(second, 80)
    assert unread(books) == 0
    books.end(first)
    assert books.outlook().requests == 0


def test_whole_answers_are_read_when_they_no_longer_wait() -> None:
    """Nobody sees their first token: a poll that was asked for later tells how many can't have been read."""
    books = Books(MEASURED)
    sent = [books.send(100, streams=False) for _ in range(3)]
    books.after(1).poll(running=1, waiting=2)
    assert unread(books) == pytest.approx(200)
    books.after(1).poll(running=3)
    assert unread(books) == 0
    for each in sent:
        books.end(each)


def test_whole_answers_are_read_where_nobody_tells() -> None:
    """Without metrics they would count as unread until they end."""
    books = Books(MEASURED)
    sent = [books.send(100, streams=False), books.send(100)]
    books.after(1).loads.lost("hi-0")
    assert unread(books) == pytest.approx(200)
    books.after(3).loads.lost("hi-0")
    assert unread(books) == pytest.approx(100)
    for each in sent:
        books.end(each)


def test_many_short_answers_are_nobody_elses() -> None:
    """However many have ended since the engine counted."""
    books = Books(MEASURED)
    for each in [books.send(1) for _ in range(600)]:
        books.end(each, 1)
    books.after(0.05).poll(running=600)
    assert books.outlook().requests == 0


def test_reading_is_not_standing_still() -> None:
    """An engine that reads one long prompt gives nothing for a while; one that gives nothing for longer is stuck."""
    books = Books(MEASURED)
    sent = books.send(3000)
    for _ in range(12):
        books.after(0.25).poll(running=1)
    assert books.outlook().answer_seconds == pytest.approx(0.025)
    for _ in range(60):
        books.after(0.25).poll(running=1)
    assert books.outlook().answer_seconds > 0.1
    books.end(sent, 1)


def test_requests_outlive_their_replicas_book() -> None:
    """One that leaves and comes back has the requests that it had, and nothing unread; old ends spoil nothing."""
    books = Books(MEASURED)
    old = books.send(100)
    books.keep("hi-1")
    books.keep("hi-0", "hi-1")
    assert (books.outlook().in_flight, books.outlook().ahead_seconds) == (1, 0)
    books.end(old)
    assert books.outlook().in_flight == 0
    old = books.send(100)
    books.keep("hi-1")
    books.keep("hi-0", "hi-1")
    new = books.send(40)
    books.loads.began(old)
    books.end(old)
    assert books.outlook().in_flight == 1
    assert unread(books) == pytest.approx(40)
    books.end(new)
    assert (books.outlook().in_flight, unread(books)) == (0, 0)


def test_ends_while_nobody_is_ready() -> None:
    """A replica may have left for good by then."""
    books = Books(MEASURED)
    sent = books.send()
    books.keep()
    books.loads.began(sent)
    books.end(sent)
    books.loads.polled("hi-0", books.now, EngineMetrics(books.now, 0.0, 0.0))
    books.loads.lost("hi-0")
    assert books.loads.outlooks("hi") == ()


# Lengths of answers


@pytest.mark.parametrize("answer_tokens", [None, 0, -5])
def test_what_is_no_answer_has_no_length(answer_tokens: int | None) -> None:
    """A replica that refuses, or can't be reached, doesn't answer in no tokens."""
    books = Books(MEASURED)
    for _ in range(100):
        books.end(books.send(), answer_tokens)
    assert books.outlook().answer_tokens == 80


def test_lengths_are_learned() -> None:
    """Little by little."""
    books = Books(MEASURED)
    for _ in range(300):
        books.end(books.send(), 20)
    assert books.outlook().answer_tokens == pytest.approx(20, abs=2)


# What is learnt, and forgotten


def stall(books: Books, name: str = "hi-0") -> None:
    """Have a replica give nothing for a while, which makes it look dead."""
    sent = books.send(name=name)
    books.loads.began(sent)
    for _ in range(40):
        books.after(0.25).poll(running=1, name=name)
    books.end(sent, 1, name)


def rest(books: Books, seconds: int) -> None:
    """Have nobody ask for anything."""
    for _ in range(seconds):
        books.after(1)
        for name in ("hi-0", "hi-1"):
            books.poll(generated=1000, name=name)


def test_a_replica_that_was_slow_gets_another_chance() -> None:
    """Else it would get no more requests, so that nobody could ever see that it is as fast as before."""
    books = Books(MEASURED)
    stall(books)
    assert books.outlook().answer_seconds > 10 * books.outlook("hi-1").answer_seconds
    rest(books, 60)
    assert books.outlook().answer_seconds < 4 * books.outlook("hi-1").answer_seconds
    rest(books, 600)
    assert books.outlook().answer_seconds == pytest.approx(books.outlook("hi-1").answer_seconds, rel=0.01)


@pytest.mark.parametrize("slower", [0.2, 1.0, 5.0, 20.0])
def test_a_replica_is_as_slow_as_it_is(slower: float) -> None:
    """Not as its square root, which is where a pace goes that is learnt from promises that have it in them."""
    books = Books(MEASURED)
    for _ in range(100):
        sent = books.send(100)
        books.after(slower * (0.025 + 100 * 0.001))
        books.loads.began(sent)
        books.end(sent)
    assert books.outlook().token_seconds == pytest.approx(slower * 0.001, rel=0.01)


def answer(books: Books, name: str, first_token_seconds: float, tokens_a_second: float) -> None:
    """Have a replica answer a request of 100 tokens."""
    books.poll(running=1, name=name)
    sent = books.send(100, name=name)
    books.after(first_token_seconds)
    books.loads.began(sent)
    for second in range(5):
        books.poll(running=1, generated=second * tokens_a_second, name=name)
        books.after(1)
    books.end(sent, 80, name)
    books.poll(name=name)


def test_so_does_one_that_nobody_measured() -> None:
    """It is believed to be as fast as its like."""
    books = Books()
    for _ in range(10):
        answer(books, "hi-1", first_token_seconds=0.1, tokens_a_second=40)
    answer(books, "hi-0", first_token_seconds=5.0, tokens_a_second=1)
    assert books.outlook().answer_seconds > 10 * books.outlook("hi-1").answer_seconds
    for _ in range(100):
        answer(books, "hi-1", first_token_seconds=0.1, tokens_a_second=40)
        books.poll()
    for figure in ("answer_seconds", "token_seconds"):
        assert getattr(books.outlook(), figure) < 1.5 * getattr(books.outlook("hi-1"), figure)


def test_cached_prompts_say_nothing_of_reading() -> None:
    """A first token that needed no reading takes a step; long prompts that were read count for more."""
    books = Books()
    answer(books, "hi-0", first_token_seconds=0.1, tokens_a_second=40)
    for long in (True, False) * 20:
        sent = books.send(2000, cached=0 if long else 2000)
        books.after(0.4 if long else 0.1)
        books.loads.began(sent)
        books.end(sent)
    assert books.outlook().token_seconds == pytest.approx(0.4 / 2000, rel=0.5)
