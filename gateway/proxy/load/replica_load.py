"""The load of one replica: what it was sent and has not answered yet, what its engine said, and how slow it is.

The formulas are gateway.routing.speed's. Times are on the monotonic clock, and come in as arguments.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf

import msgspec

from gateway.routing.engine_metrics import EngineMetrics
from gateway.routing.latency import LatencyEstimate
from gateway.routing.rendezvous import hash_of
from gateway.routing.speed import (
    NO_ESTIMATE,
    NO_SLOWDOWN,
    Estimate,
    Slowdown,
    SpeedProfile,
    answered,
    estimate_answering,
    estimate_first_token,
    estimate_rested,
    first_token,
    observed_slots,
    rested,
)
from serving.replica import Replica

# Polls are due at least once a second: one failed poll changes nothing yet, three do.
STALE_SECONDS = 3.0
# An engine's gauges are as old as its last step.
GAUGE_LAG_SECONDS = 0.1
MAX_ENDINGS = 4096
# A first token shows how fast a replica reads only if it hardly had to queue.
MAX_QUEUE_SHARE = 0.1
# Polls further apart say nothing about the time between them.
MAX_POLL_GAP_SECONDS = 10.0
# An engine without output may be reading a prompt for so long; then it counts as stalled.
MAX_READING_SECONDS = 10.0


@dataclass(slots=True, eq=False)
class SharedEstimate:
    """What the replicas of a variant have shown together; the prior of a replica that has shown nothing."""

    estimate: Estimate = NO_ESTIMATE


class InFlight(msgspec.Struct, eq=False):
    """One request at a replica, from its lease to its end."""

    load: "ReplicaLoad"
    sent_at: float
    tokens: float  # of its prompt, without what is probably cached
    tokens_ahead: float  # of prompts that were unread when it was sent
    streams: bool
    unqueued: bool  # it hardly had to wait for a slot
    expected_seconds: float  # until its first token at the measured speed; 0: not measured
    first_token_at: float | None = None
    unread: bool = True
    ended: bool = False

    def first_token(self) -> None:
        """Record that its first token arrived: the prompt has been read. Later calls change nothing."""
        if self.unread and not self.ended:
            self.load.first_token(self)


@dataclass(slots=True, eq=False)
class ReplicaLoad:
    """The load of one replica; `others` is how many requests of other senders its engine had at the last poll.

    Whatever changes it puts it into `outdated`, at its place among its siblings: its latency estimate is out of date.
    """

    replica: Replica
    shared: SharedEstimate
    clock: Callable[[], float]
    outdated: dict["ReplicaLoad", int]
    place: int
    in_flight: dict[InFlight, None] = field(default_factory=dict)
    unread_tokens: float = 0.0
    sent_tokens: float = 0.0  # of those that are in flight and were sent since the poll
    sent_requests: int = 0
    poll: EngineMetrics | None = None
    polled_at: float = -inf  # when the last poll was sent
    observed_at: float | None = None
    others: float = 0.0
    stale: bool = True
    observed_slots: float = inf
    slowdown: Slowdown = NO_SLOWDOWN
    estimate: Estimate = NO_ESTIMATE
    was_idle: bool = True  # at any moment since the poll
    endings: deque[float] = field(default_factory=lambda: deque(maxlen=MAX_ENDINGS))
    hash: int = field(init=False)

    def __post_init__(self) -> None:
        self.hash = hash_of(self.replica.id)

    def send(self, latency: LatencyEstimate, tokens: float, streams: bool) -> InFlight:
        """Count a request in; `tokens` of its prompt have to be read, `latency` is what it was chosen by."""
        expected = latency.ahead_seconds + latency.step_seconds + tokens * latency.token_seconds
        unqueued = latency.queue_seconds + latency.kv_seconds <= MAX_QUEUE_SHARE * expected
        # `expected` already includes the learned slowdown. Divide it out, or the estimate feeds back on itself and
        # settles at the square root.
        as_measured = expected / latency.reading if latency.measured else 0.0
        request = InFlight(self, self.clock(), tokens, self.unread_tokens, streams, unqueued, as_measured)
        self.in_flight[request] = None
        self.unread_tokens += tokens
        self.sent_tokens += tokens
        self.sent_requests += 1
        self.outdated[self] = self.place
        return request

    def first_token(self, request: InFlight) -> None:
        """Record a first token, and learn from it how fast the replica reads."""
        self._mark_read(request)
        now = request.first_token_at = self.clock()
        self.outdated[self] = self.place
        if not request.unqueued:
            return
        seconds = now - request.sent_at
        if request.expected_seconds:
            self.slowdown = first_token(self.slowdown, request.expected_seconds, seconds)
            return
        tokens = request.tokens_ahead + request.tokens
        self.estimate = estimate_first_token(self.estimate, seconds, tokens)
        self.shared.estimate = estimate_first_token(self.shared.estimate, seconds, tokens)

    def end(self, request: InFlight, now: float) -> None:
        """Count a request out."""
        request.ended = True
        self._mark_read(request)
        del self.in_flight[request]
        if not self.in_flight:
            # Sums of fractions do not return to zero by themselves.
            self.unread_tokens, self.sent_tokens, self.sent_requests = 0.0, 0.0, 0
            self.was_idle = True
        elif request.sent_at >= self.polled_at:
            self.sent_tokens -= request.tokens
            self.sent_requests -= 1
        self.endings.append(now)
        self.outdated[self] = self.place

    def update(self, poll: EngineMetrics, polled_at: float, ours: int, speed: SpeedProfile | None) -> None:
        """Apply a poll sent at `polled_at`; it says nothing about requests sent since; `ours` are in flight."""
        running, waiting = poll.running or 0.0, poll.waiting or 0.0
        if ours or running or waiting or not self.was_idle:
            self._learn(poll, speed)
        else:
            self._rest(poll.at_seconds)
        self.observed_at = poll.at_seconds
        while self.endings and self.endings[0] < polled_at - GAUGE_LAG_SECONDS:
            self.endings.popleft()
        self.others = max(running + waiting - ours - len(self.endings), 0.0)
        self.observed_slots = observed_slots(self.observed_slots, self.poll, poll)
        self._mark_unary_read(waiting, polled_at)
        since = [request.tokens for request in self.in_flight if request.sent_at >= polled_at]
        self.sent_tokens, self.sent_requests = sum(since), len(since)
        self.was_idle = not ours
        self.poll, self.polled_at, self.stale = poll, polled_at, False
        self.outdated[self] = self.place

    def poll_failed(self, ours: int) -> None:
        """Record that a poll failed; the last one stays valid for STALE_SECONDS."""
        now = self.clock()
        if self.poll is not None and now - self.poll.at_seconds <= STALE_SECONDS:
            return
        self.stale = True
        self.observed_slots = inf
        # No poll says when the prompts of unary answers are read.
        self._mark_unary_read(0, now - STALE_SECONDS)
        if not ours:
            self._rest(now)
            self.observed_at = now
        self.outdated[self] = self.place

    def learn_from_answer(self, requests: float, tokens: int, seconds: float, speed: SpeedProfile | None) -> None:
        """Learn the speed from one answer among so many requests, where no poll shows it."""
        if speed is not None:
            self.slowdown = answered(self.slowdown, seconds / speed.step_at(requests), tokens, seconds)
        self.estimate = estimate_answering(self.estimate, 1.0, tokens, seconds)

    def _mark_read(self, request: InFlight) -> None:
        if request.unread:
            request.unread = False
            self.unread_tokens -= request.tokens

    def _rest(self, now: float) -> None:
        """Let the slowdown of an idle replica fade: otherwise no request would try it again."""
        seconds = 0.0 if self.observed_at is None else max(now - self.observed_at, 0.0)
        self.slowdown = rested(self.slowdown, seconds)
        self.estimate = estimate_rested(self.estimate, self.shared.estimate, seconds)

    def _learn(self, poll: EngineMetrics, speed: SpeedProfile | None) -> None:
        """Compare the tokens that an engine generated since the last poll with what its speed allows."""
        before = self.poll
        if before is None or before.generated_tokens is None or poll.generated_tokens is None or self.was_idle:
            return
        requests = ((before.running or 0.0) + (poll.running or 0.0)) / 2
        seconds = poll.at_seconds - before.at_seconds
        tokens = poll.generated_tokens - before.generated_tokens
        if not 0 < seconds < MAX_POLL_GAP_SECONDS or tokens < 0 or not requests:
            return
        if not tokens and self._may_be_reading(poll.at_seconds):
            return
        if speed is not None:
            self.slowdown = answered(self.slowdown, speed.together_at(requests) * seconds, tokens, seconds)
        self.estimate = estimate_answering(self.estimate, requests, tokens, seconds)
        self.shared.estimate = estimate_answering(self.shared.estimate, requests, tokens, seconds)

    def _may_be_reading(self, now: float) -> bool:
        oldest = next((request for request in self.in_flight if request.unread), None)
        return oldest is not None and now - oldest.sent_at < MAX_READING_SECONDS

    def _mark_unary_read(self, waiting: float, polled_at: float) -> None:
        """Mark prompts of unary answers as read, except as many as wait: their first tokens are not visible."""
        unary = [
            request
            for request in self.in_flight
            if request.unread and not request.streams and request.sent_at < polled_at
        ]
        for request in unary[: max(len(unary) - int(waiting), 0)]:
            self._mark_read(request)
