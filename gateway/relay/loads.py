"""What is known of each replica's load: what we sent it, exactly, and what its engine says, of late.

The only owner of that; the formulas are gateway.routing's, and counts of requests in flight the registry's.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf

from gateway.routing.outlook import Outlook, Standing, outlook
from gateway.routing.polls import Poll
from gateway.routing.speed import (
    AS_MEASURED,
    NOTHING_LEARNT,
    USUAL_ANSWER_TOKENS,
    Learnt,
    Pace,
    Speed,
    answered,
    first_token,
    learnt_answering,
    learnt_first_token,
    learnt_rested,
    places_seen,
    rested,
)
from serving.replica import Replica

UNMEASURED: Mapping[str, Speed] = {}
# A poll is due at least once a second: one that failed is no news yet, three are.
STALE_SECONDS = 3.0
# An engine's gauges are as old as its last step.
GAUGE_LAG_SECONDS = 0.1
# Of a variant's answer length: each answer is a fiftieth of the mean.
LENGTH_SHARE = 0.02
MIX_ANSWERS = 10
MOST_ENDINGS = 4096
# A first token says how fast a replica reads only if there was hardly a queue.
CLEAR_SHARE = 0.1
FRESH_SECONDS = 10.0
# So long an engine that gives nothing may be reading a prompt; then it stands still.
LONGEST_READING_SECONDS = 10.0


@dataclass(slots=True, eq=False)
class Sent:
    """One request at a replica, as long as it is there."""

    book: "_Book"
    at: float
    tokens: float  # of its prompt, without what is probably cached
    tokens_ahead: float  # of prompts that hadn't been read when it came
    streams: bool
    clear: bool  # it had not to wait for a place
    expected_seconds: float  # until its first token, at the measured speed; 0: nobody measured
    unread: bool = True
    began_at: float | None = None
    ended: bool = False


@dataclass(slots=True, eq=False)
class _Book:
    """What is known of one replica."""

    replica: Replica
    unread_tokens: float = 0.0
    unread: dict[Sent, None] = field(default_factory=dict)
    sent_tokens: float = 0.0
    poll: Poll | None = None
    others: float = 0.0
    stale: bool = True
    places_seen: float = inf
    pace: Pace = AS_MEASURED
    learnt: Learnt = NOTHING_LEARNT
    endings: deque[float] = field(default_factory=lambda: deque(maxlen=MOST_ENDINGS))
    was_idle: bool = True  # at any moment since the poll
    looked_at: float | None = None
    outlook: Outlook | None = None


@dataclass(slots=True, eq=False)
class _Rung:
    """The ready replicas of one variant, with their outlooks in the same order."""

    books: list[_Book]
    outlooks: list[Outlook]
    answer_tokens: float
    answers: int  # that this is the mean of
    learnt: Learnt = NOTHING_LEARNT  # of all of them
    outdated: dict[_Book, int] = field(default_factory=dict)  # with their places


class Loads:
    """Keeps the books of every ready replica; `in_flight` and `speeds` (by variant) are others' to change."""

    def __init__(
        self,
        in_flight: Mapping[str, int],
        speeds: Mapping[str, Speed] = UNMEASURED,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._in_flight = in_flight
        self._speeds = speeds
        self._clock = clock
        self._books: dict[str, tuple[_Book, _Rung, int]] = {}
        self._rungs: dict[str, _Rung] = {}

    def outlooks(self, variant: str) -> Sequence[Outlook]:
        """What a variant's ready replicas can promise, as of now."""
        rung = self._rungs.get(variant)
        if rung is None:
            return ()
        if rung.outdated:
            self._renew(rung, variant)
        return rung.outlooks

    def standings(self, variant: str) -> list[Standing]:
        """What is known of a variant's ready replicas, for whoever explains a decision."""
        rung = self._rungs.get(variant)
        if rung is None:
            return []
        mean_others = _mean_others(rung)
        return [self._standing(book, rung, variant, mean_others) for book in rung.books]

    def keep(self, ready: Mapping[str, tuple[Replica, ...]]) -> None:
        """Take over which replicas are ready; one that is another than before begins anew."""
        known = self._books
        self._books, rungs = {}, {}
        for variant, replicas in ready.items():
            before = self._rungs.get(variant)
            books = [self._kept(known, replica) for replica in replicas]
            rung = _Rung(books, [], *_lengths(before, self._speeds.get(variant)))
            rung.learnt = before.learnt if before else NOTHING_LEARNT
            for place, book in enumerate(books):
                self._books[book.replica.id] = (book, rung, place)
                rung.outdated[book] = place
            rungs[variant] = rung
        self._rungs = rungs

    def measured(self, speeds: Mapping[str, Speed]) -> None:
        """Go by other measurements."""
        self._speeds = speeds
        for rung in self._rungs.values():
            rung.outdated.update({book: place for place, book in enumerate(rung.books)})

    def sent(self, promised: Outlook, prompt_tokens: float, cached_tokens: float, *, streams: bool) -> Sent:
        """Note a request in the step in which the registry counts it."""
        now = self._clock()
        book, rung, place = self._books[promised.id]
        tokens = max(prompt_tokens - cached_tokens, 0.0)
        expected = promised.ahead_seconds + promised.step_seconds + tokens * promised.token_seconds
        clear = promised.queue_seconds + promised.kv_seconds <= CLEAR_SHARE * expected
        # What is promised has the pace in it, which is to be learnt: else it would come to its own square root.
        as_measured = expected / promised.reading if promised.measured else 0.0
        sent = Sent(book, now, tokens, book.unread_tokens, streams, clear, as_measured)
        book.unread[sent] = None
        book.unread_tokens += tokens
        book.sent_tokens += tokens
        rung.outdated[book] = place
        return sent

    def began(self, sent: Sent) -> None:
        """Note a first token: the prompt has been read."""
        if not sent.unread:
            return
        self._read(sent)
        sent.began_at = now = self._clock()
        book, seconds = sent.book, now - sent.at
        if not sent.clear:
            return
        if sent.expected_seconds:
            book.pace = first_token(book.pace, sent.expected_seconds, seconds)
            return
        tokens = sent.tokens_ahead + sent.tokens
        book.learnt = learnt_first_token(book.learnt, seconds, tokens)
        if (kept := self._books.get(book.replica.id)) is not None:
            kept[1].learnt = learnt_first_token(kept[1].learnt, seconds, tokens)

    def ended(self, sent: Sent, answer_tokens: int | None) -> None:
        """Note the end of a request, in the step in which it is counted down; None: nobody knows its length."""
        if sent.ended:
            return
        sent.ended = True
        book, now = sent.book, self._clock()
        if sent.unread:
            self._read(sent)
        book.endings.append(now)
        kept = self._books.get(book.replica.id)
        if kept is None:
            return
        present, rung, place = kept
        # Whichever book it is now: a replica that comes back has the requests that it had.
        rung.outdated[present] = place
        if present is not book:
            return
        in_flight = self._in_flight.get(book.replica.id, 0)
        if not in_flight:
            book.was_idle = True
        if answer_tokens is not None and answer_tokens > 0:
            if book.stale and sent.began_at is not None:
                self._learn_of(book, in_flight + 1, answer_tokens - 1, now - sent.began_at)
            rung.answers += 1
            rung.answer_tokens += max(1 / rung.answers, LENGTH_SHARE) * (answer_tokens - rung.answer_tokens)

    def busy(self, replica_id: str) -> bool:
        """Tell whether a replica is worth a closer look."""
        return self._in_flight.get(replica_id, 0) > 0

    def polled(self, replica_id: str, asked_at: float, poll: Poll) -> None:
        """Take over what an engine says, which tells nothing of what was sent since it was asked."""
        kept = self._books.get(replica_id)
        if kept is None or poll.running is None or poll.waiting is None:
            return
        book, rung, place = kept
        ours = self._in_flight.get(replica_id, 0)
        if ours or poll.running or poll.waiting or not book.was_idle:
            self._learn(book, rung, poll)
        else:
            self._rest(book, rung)
        book.looked_at = poll.at_seconds
        while book.endings and book.endings[0] < asked_at - GAUGE_LAG_SECONDS:
            book.endings.popleft()
        book.others = max(poll.running + poll.waiting - ours - len(book.endings), 0.0)
        book.places_seen = places_seen(book.places_seen, book.poll, poll)
        self._forget_read(book, poll.waiting, asked_at)
        book.sent_tokens = sum(sent.tokens for sent in book.unread if sent.at >= asked_at)
        book.was_idle = not ours
        book.poll, book.stale = poll, False
        rung.outdated[book] = place
        rung.outdated.update({each: at for at, each in enumerate(rung.books) if each.stale})

    def lost(self, replica_id: str) -> None:
        """Note that an engine wasn't to be asked: what it said last holds for a little while."""
        kept = self._books.get(replica_id)
        if kept is None:
            return
        book, rung, place = kept
        if book.poll is None or self._clock() - book.poll.at_seconds > STALE_SECONDS:
            book.stale = True
            book.places_seen = inf
            # Nobody tells when whole answers' prompts are read.
            self._forget_read(book, 0, self._clock() - STALE_SECONDS)
            rung.outdated[book] = place
            if not self._in_flight.get(replica_id):
                self._rest(book, rung)
                book.looked_at = self._clock()

    def _kept(self, known: Mapping[str, tuple[_Book, _Rung, int]], replica: Replica) -> _Book:
        entry = known.get(replica.id)
        if entry is not None and entry[0].replica == replica:
            return entry[0]
        return _Book(replica)

    def _renew(self, rung: _Rung, variant: str) -> None:
        mean_others = _mean_others(rung) if any(book.stale for book in rung.outdated) else 0.0
        if not rung.outlooks:
            rung.outlooks = [outlook(self._standing(book, rung, variant, mean_others)) for book in rung.books]
        else:
            for book, place in rung.outdated.items():
                rung.outlooks[place] = outlook(self._standing(book, rung, variant, mean_others))
        rung.outdated.clear()

    def _standing(self, book: _Book, rung: _Rung, variant: str, mean_others: float) -> Standing:
        return Standing(
            replica=book.replica,
            in_flight=self._in_flight.get(book.replica.id, 0),
            # Nobody is thought idle for being silent.
            others=max(book.others, mean_others) if book.stale else book.others,
            unread_tokens=max(book.unread_tokens, 0.0),
            sent_tokens=book.sent_tokens,
            poll=book.poll,
            stale=book.stale,
            places_seen=book.places_seen,
            pace=book.pace,
            speed=self._speeds.get(variant) or book.learnt.speed(rung.answer_tokens),
            answer_tokens=rung.answer_tokens,
        )

    def _read(self, sent: Sent) -> None:
        sent.unread = False
        book = sent.book
        book.unread.pop(sent, None)
        book.unread_tokens = book.unread_tokens - sent.tokens if book.unread else 0.0
        kept = self._books.get(book.replica.id)
        if kept is not None and kept[0] is book:
            kept[1].outdated[book] = kept[2]

    def _forget_read(self, book: _Book, waiting: float, asked_at: float) -> None:
        """Of answers that come whole nobody sees the first token: those that don't wait have been read, soon enough."""
        silent = [sent for sent in book.unread if not sent.streams and sent.at < asked_at]
        for sent in silent[: max(len(silent) - int(waiting), 0)]:
            self._read(sent)

    def _learn(self, book: _Book, rung: _Rung, poll: Poll) -> None:
        """Compare what an engine gave since the last look with what it should have given."""
        before = book.poll
        if before is None or before.generated_tokens is None or poll.generated_tokens is None or book.was_idle:
            return
        requests = ((before.running or 0.0) + (poll.running or 0.0)) / 2
        seconds = poll.at_seconds - before.at_seconds
        tokens = poll.generated_tokens - before.generated_tokens
        if not 0 < seconds < FRESH_SECONDS or tokens < 0 or not requests:
            return
        if not tokens and book.unread and self._clock() - next(iter(book.unread)).at < LONGEST_READING_SECONDS:
            return
        speed = self._speeds.get(book.replica.variant)
        if speed is not None:
            book.pace = answered(book.pace, speed.together_at(requests) * seconds, tokens, seconds)
        book.learnt = learnt_answering(book.learnt, requests, tokens, seconds)
        rung.learnt = learnt_answering(rung.learnt, requests, tokens, seconds)

    def _rest(self, book: _Book, rung: _Rung) -> None:
        """Doubt the slowness of a replica that has nothing to do: else nobody would try it again."""
        seconds = 0.0 if book.looked_at is None else max(self._clock() - book.looked_at, 0.0)
        book.pace = rested(book.pace, seconds)
        book.learnt = learnt_rested(book.learnt, rung.learnt, seconds)

    def _learn_of(self, book: _Book, requests: float, tokens: int, seconds: float) -> None:
        """Where no poll tells how fast an engine answers, one answer among so many does."""
        speed = self._speeds.get(book.replica.variant)
        if speed is not None:
            book.pace = answered(book.pace, seconds / speed.step_at(requests), tokens, seconds)
        book.learnt = learnt_answering(book.learnt, 1.0, tokens, seconds)


def _lengths(before: _Rung | None, speed: Speed | None) -> tuple[float, int]:
    """How long answers are on average, and how many answers say so: a measurement's mix counts as some."""
    if before is not None:
        return before.answer_tokens, before.answers
    return (speed.answer_tokens, MIX_ANSWERS) if speed else (USUAL_ANSWER_TOKENS, 0)


def _mean_others(rung: _Rung) -> float:
    """How many requests of others the replicas have that we hear of."""
    heard = [book.others for book in rung.books if not book.stale]
    return sum(heard) / len(heard) if heard else 0.0
