"""What is known of each replica's load: what we sent it, exactly, and what its engine says, of late.

The only owner of that; the formulas are gateway.routing's, and counts of requests in flight the registry's.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from gateway.proxy.load.replica_load import InFlight, ReplicaLoad, SharedEstimate
from gateway.routing.engine_metrics import EngineMetrics
from gateway.routing.latency import LatencyEstimate, ReplicaMetrics, estimate_latency
from gateway.routing.speed import USUAL_ANSWER_TOKENS, SpeedProfile
from serving.replica import Replica

UNMEASURED: Mapping[str, SpeedProfile] = {}
# Of a variant's answer length: each answer is a fiftieth of the mean; a measurement's mix counts as so many.
LENGTH_SHARE = 0.02
MIX_ANSWERS = 10


@dataclass(slots=True, eq=False)
class _Rung:
    """The ready replicas of one variant, with their outlooks in the same order."""

    variant: str
    books: list[ReplicaLoad]
    learned: SharedEstimate
    answer_tokens: float
    answers: int  # that this is the mean of
    outlooks: tuple[LatencyEstimate, ...] = ()
    outdated: dict[ReplicaLoad, int] = field(default_factory=dict)  # with their places

    def mean_others(self) -> float:
        """How many requests of others the replicas have that we hear of."""
        heard = [book.others for book in self.books if not book.stale]
        return sum(heard) / len(heard) if heard else 0.0


class _Entry(NamedTuple):
    book: ReplicaLoad
    rung: _Rung
    place: int

    def touch(self) -> None:
        """Have the replica's outlook made anew before it is looked at again."""
        self.rung.outdated[self.book] = self.place


class LoadTracker:
    """Keeps the books of every ready replica; `in_flight` and `speeds` (by variant) are others' to change."""

    def __init__(
        self,
        in_flight: Mapping[str, int],
        speeds: Mapping[str, SpeedProfile] = UNMEASURED,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._in_flight = in_flight
        self._speeds = speeds
        self._clock = clock
        self._entries: dict[str, _Entry] = {}
        self._rungs: dict[str, _Rung] = {}

    def variant_of(self, replica_id: str) -> str | None:
        """Whose replica it is; None if it isn't ready."""
        entry = self._entries.get(replica_id)
        return None if entry is None else entry.rung.variant

    def outlooks(self, variant: str) -> tuple[LatencyEstimate, ...]:
        """What a variant's ready replicas can promise, as of now."""
        rung = self._rungs.get(variant)
        if rung is None:
            return ()
        if rung.outdated:
            self._renew(rung)
        return rung.outlooks

    def standings(self, variant: str) -> list[ReplicaMetrics]:
        """What is known of a variant's ready replicas."""
        rung = self._rungs.get(variant)
        if rung is None:
            return []
        mean_others = rung.mean_others()
        return [self._standing(book, rung, mean_others) for book in rung.books]

    def keep(self, ready: Mapping[str, tuple[Replica, ...]]) -> None:
        """Take over which replicas are ready; one that is another than before begins anew."""
        known = self._entries
        self._entries, rungs = {}, {}
        for variant, replicas in ready.items():
            books = [_kept(known, replica) for replica in replicas]
            rung = rungs[variant] = self._rung(variant, books)
            for place, book in enumerate(books):
                entry = self._entries[book.replica.id] = _Entry(book, rung, place)
                entry.touch()
        self._rungs = rungs

    def measured(self, speeds: Mapping[str, SpeedProfile]) -> None:
        """Go by other measurements."""
        self._speeds = speeds
        for entry in self._entries.values():
            entry.touch()

    def sent(self, promised: LatencyEstimate, prompt_tokens: float, cached_tokens: float, *, streams: bool) -> InFlight:
        """Note a request in the step in which the registry counts it."""
        entry = self._entries[promised.id]
        entry.touch()
        tokens = max(prompt_tokens - cached_tokens, 0.0)
        return entry.book.sent(promised, tokens, self._clock(), streams=streams)

    def began(self, sent: InFlight) -> None:
        """Note a first token: the prompt has been read."""
        if not sent.unread or sent.ended:
            return
        entry = self._entries.get(sent.book.replica.id)
        sent.book.began(sent, entry.rung.learned if entry else SharedEstimate(), self._clock())
        if entry is not None:
            entry.touch()

    def ended(self, sent: InFlight, answer_tokens: int | None) -> None:
        """Note the end of a request, in the step in which it is counted down; None: nobody knows its length."""
        if sent.ended:
            return
        book, now = sent.book, self._clock()
        book.ended(sent, now)
        entry = self._entries.get(book.replica.id)
        if entry is None:
            return
        # Whichever book it is now: a replica that comes back has the requests that it had.
        entry.touch()
        if answer_tokens is not None and answer_tokens > 0 and entry.book is book:
            self._learn_length(entry.rung, answer_tokens)
            if book.stale and sent.began_at is not None:
                speed, at_once = self._speeds.get(entry.rung.variant), len(book.here) + 1
                book.learn_of(at_once, answer_tokens - 1, now - sent.began_at, speed)

    def busy(self, replica_id: str) -> bool:
        """Tell whether a replica is worth a closer look."""
        return self._in_flight.get(replica_id, 0) > 0

    def polled(self, replica_id: str, asked_at: float, poll: EngineMetrics) -> None:
        """Take over what an engine says of its load."""
        entry = self._entries.get(replica_id)
        if entry is None or not poll.tells_load:
            return
        rung, ours = entry.rung, self._in_flight.get(replica_id, 0)
        entry.book.looked(poll, asked_at, ours, self._speeds.get(rung.variant), rung.learned)
        entry.touch()
        # What is thought of those that are silent depends on it.
        rung.outdated.update({book: place for place, book in enumerate(rung.books) if book.stale})

    def lost(self, replica_id: str) -> None:
        """Note that an engine wasn't to be asked: what it said last holds for a little while."""
        entry = self._entries.get(replica_id)
        if entry is None:
            return
        if entry.book.lost(self._in_flight.get(replica_id, 0), entry.rung.learned, self._clock()):
            entry.touch()

    def _rung(self, variant: str, books: list[ReplicaLoad]) -> _Rung:
        before, speed = self._rungs.get(variant), self._speeds.get(variant)
        if before is not None:
            return _Rung(variant, books, before.learned, before.answer_tokens, before.answers)
        if speed is not None:
            return _Rung(variant, books, SharedEstimate(), speed.answer_tokens, MIX_ANSWERS)
        return _Rung(variant, books, SharedEstimate(), USUAL_ANSWER_TOKENS, 0)

    def _renew(self, rung: _Rung) -> None:
        mean_others = rung.mean_others() if any(book.stale for book in rung.outdated) else 0.0
        if rung.outlooks:
            outlooks = list(rung.outlooks)
            for book, place in rung.outdated.items():
                outlooks[place] = estimate_latency(self._standing(book, rung, mean_others))
        else:
            outlooks = [estimate_latency(self._standing(book, rung, mean_others)) for book in rung.books]
        # Decisions keep what they were made on.
        rung.outlooks = tuple(outlooks)
        rung.outdated.clear()

    def _standing(self, book: ReplicaLoad, rung: _Rung, mean_others: float) -> ReplicaMetrics:
        return ReplicaMetrics(
            book.replica,
            self._in_flight.get(book.replica.id, 0),
            # Nobody is thought idle for being silent.
            max(book.others, mean_others) if book.stale else book.others,
            max(book.unread_tokens, 0.0),
            max(book.sent_tokens, 0.0),
            book.sent_requests,
            book.poll,
            book.stale,
            book.observed_slots,
            book.pace,
            self._speeds.get(rung.variant) or book.learnt.speed(rung.answer_tokens),
            rung.answer_tokens,
        )

    @staticmethod
    def _learn_length(rung: _Rung, answer_tokens: int) -> None:
        rung.answers += 1
        rung.answer_tokens += max(1 / rung.answers, LENGTH_SHARE) * (answer_tokens - rung.answer_tokens)


def _kept(known: Mapping[str, _Entry], replica: Replica) -> ReplicaLoad:
    entry = known.get(replica.id)
    if entry is not None and entry.book.replica == replica:
        return entry.book
    return ReplicaLoad(replica)
