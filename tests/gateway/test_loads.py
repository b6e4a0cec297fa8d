"""What is known of each replica's load: what is counted up is counted down, and what is learnt is forgotten again."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from gateway.relay.loads import UNMEASURED, Loads, Sent
from gateway.routing.outlook import Outlook
from gateway.routing.polls import Poll
from gateway.routing.speed import Speed
from serving.replica import Replica

SPEED = Speed((0.025,) * 4, (40.0, 80.0, 120.0, 160.0), 0.001, 4, answer_tokens=80.0, kv_capacity_tokens=10_000)
MEASURED = {"hi": SPEED}


def replica(name: str, url: str = "") -> Replica:
    """One of the variant `hi`."""
    return Replica(name, "hi", "any", url or f"http://{name}", "m1", max_in_flight=1000)


@dataclass
class Books:
    """Loads, with a registry's count and a clock that the test moves."""

    speeds: Mapping[str, Speed] = field(default_factory=lambda: UNMEASURED)
    now: float = 0.0
    in_flight: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.loads = Loads(self.in_flight, self.speeds, lambda: self.now)
        self.keep("hi-0", "hi-1")

    def keep(self, *names: str) -> None:
        """Have these be ready."""
        self.loads.keep({"hi": tuple(map(replica, names))} if names else {})

    def outlook(self, name: str = "hi-0") -> Outlook:
        """What a replica promises."""
        return next(each for each in self.loads.outlooks("hi") if each.id == name)

    def send(self, tokens: float = 10.0, *, cached: float = 0.0, streams: bool = True, name: str = "hi-0") -> Sent:
        """Send a request."""
        sent = self.loads.sent(self.outlook(name), tokens, cached, streams=streams)
        self.in_flight[name] = self.in_flight.get(name, 0) + 1
        return sent

    def end(self, sent: Sent, answer_tokens: int | None = 80, name: str = "hi-0") -> None:
        """End one."""
        self.in_flight[name] -= 1
        if not self.in_flight[name]:
            del self.in_flight[name]
        self.loads.ended(sent, answer_tokens)

    def poll(self, running: float = 0, waiting: float = 0, generated: float = 0, name: str = "hi-0") -> None:
        """Have an engine say how it is, now."""
        self.loads.polled(name, self.now, Poll(self.now, running, waiting, 0.0, None, 0.0, generated))

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


def test_requests_outlive_their_replicas_book() -> None:
    """One that leaves and comes back has the requests that it had, and nothing unread; old ends spoil nothing."""
    books = Books(MEASURED)
    old = books.send(100)
    books.keep("hi-1")
    books.keep("hi-0", "hi-1")
    assert (books.outlook().in_flight, books.outlook().ahead_seconds) == (1, 0)
    new = books.send(40)
    books.loads.began(old)
    books.end(old)
    assert (books.outlook().in_flight, unread(books)) == (1, pytest.approx(40))
    books.end(new)
    assert (books.outlook().in_flight, unread(books)) == (0, 0)


def test_ends_while_nobody_is_ready() -> None:
    """A replica may have left for good by then."""
    books = Books(MEASURED)
    sent = books.send()
    books.keep()
    books.loads.began(sent)
    books.end(sent)
    books.loads.polled("hi-0", books.now, Poll(books.now, 0.0, 0.0))
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
