"""What is known of one replica: what it was sent and has not read or answered yet, what its engine said, and its pace.

The formulas are gateway.routing.speed's. Times are on the monotonic clock, and come in as arguments.
"""

from collections import deque
from dataclasses import dataclass, field
from math import inf

from gateway.routing.engine_metrics import EngineMetrics
from gateway.routing.latency import LatencyEstimate
from gateway.routing.speed import (
    NO_ESTIMATE,
    NO_SLOWDOWN,
    Estimate,
    Slowdown,
    SpeedProfile,
    answered,
    first_token,
    learnt_answering,
    learnt_first_token,
    learnt_rested,
    observed_slots,
    rested,
)
from serving.replica import Replica

# A poll is due at least once a second: one that failed is no news yet, three are.
STALE_SECONDS = 3.0
# An engine's gauges are as old as its last step.
GAUGE_LAG_SECONDS = 0.1
MOST_ENDINGS = 4096
# A first token says how fast a replica reads only if there was hardly a queue.
CLEAR_SHARE = 0.1
# Looks that are further apart say nothing of the time between them.
FRESH_SECONDS = 10.0
# So long an engine that gives nothing may be reading a prompt; then it stands still.
LONGEST_READING_SECONDS = 10.0


@dataclass(slots=True, eq=False)
class InFlight:
    """One request at a replica, as long as it is there."""

    book: "ReplicaLoad"
    at: float
    tokens: float  # of its prompt, without what is probably cached
    tokens_ahead: float  # of prompts that hadn't been read when it came
    streams: bool
    clear: bool  # it had not to wait for a place
    expected_seconds: float  # until its first token, at the measured speed; 0: nobody measured
    began_at: float | None = None
    unread: bool = True
    ended: bool = False


@dataclass(slots=True, eq=False)
class SharedEstimate:
    """What the replicas of a variant taught together, for one of them that nothing is known of."""

    learnt: Estimate = NO_ESTIMATE


@dataclass(slots=True, eq=False)
class ReplicaLoad:
    """One replica's; `others` is how many requests its engine has that aren't ours, as of the last poll."""

    replica: Replica
    here: dict[InFlight, None] = field(default_factory=dict)
    unread_tokens: float = 0.0
    sent_tokens: float = 0.0  # of those that are here, and have come since the poll
    sent_requests: int = 0
    poll: EngineMetrics | None = None
    asked_at: float = -inf
    looked_at: float | None = None
    others: float = 0.0
    stale: bool = True
    observed_slots: float = inf
    pace: Slowdown = NO_SLOWDOWN
    learnt: Estimate = NO_ESTIMATE
    was_idle: bool = True  # at any moment since the poll
    endings: deque[float] = field(default_factory=lambda: deque(maxlen=MOST_ENDINGS))

    def sent(self, promised: LatencyEstimate, tokens: float, now: float, *, streams: bool) -> InFlight:
        """Note a request; `tokens` of its prompt have to be read."""
        expected = promised.ahead_seconds + promised.step_seconds + tokens * promised.token_seconds
        clear = promised.queue_seconds + promised.kv_seconds <= CLEAR_SHARE * expected
        # What is promised has the pace in it, which is to be learnt: else it would come to its own square root.
        as_measured = expected / promised.reading if promised.measured else 0.0
        sent = InFlight(self, now, tokens, self.unread_tokens, streams, clear, as_measured)
        self.here[sent] = None
        self.unread_tokens += tokens
        self.sent_tokens += tokens
        self.sent_requests += 1
        return sent

    def began(self, sent: InFlight, learned: SharedEstimate, now: float) -> None:
        """Note a first token: the prompt has been read, and it shows how fast."""
        self.read(sent)
        sent.began_at, seconds = now, now - sent.at
        if not sent.clear:
            return
        if sent.expected_seconds:
            self.pace = first_token(self.pace, sent.expected_seconds, seconds)
            return
        tokens = sent.tokens_ahead + sent.tokens
        self.learnt = learnt_first_token(self.learnt, seconds, tokens)
        learned.learnt = learnt_first_token(learned.learnt, seconds, tokens)

    def read(self, sent: InFlight) -> None:
        """Note that a prompt has been read."""
        if sent.unread:
            sent.unread = False
            self.unread_tokens -= sent.tokens

    def ended(self, sent: InFlight, now: float) -> None:
        """Note that a request isn't there any more."""
        sent.ended = True
        self.read(sent)
        del self.here[sent]
        if not self.here:
            # Sums of fractions don't end at nothing by themselves.
            self.unread_tokens, self.sent_tokens, self.sent_requests = 0.0, 0.0, 0
            self.was_idle = True
        elif sent.at >= self.asked_at:
            self.sent_tokens -= sent.tokens
            self.sent_requests -= 1
        self.endings.append(now)

    def looked(
        self, poll: EngineMetrics, asked_at: float, ours: int, speed: SpeedProfile | None, learned: SharedEstimate
    ) -> None:
        """Take over what the engine says, which tells nothing of what was sent since it was asked."""
        running, waiting = poll.running or 0.0, poll.waiting or 0.0
        if ours or running or waiting or not self.was_idle:
            self._learn(poll, speed, learned)
        else:
            self.rest(learned, poll.at_seconds)
        self.looked_at = poll.at_seconds
        while self.endings and self.endings[0] < asked_at - GAUGE_LAG_SECONDS:
            self.endings.popleft()
        self.others = max(running + waiting - ours - len(self.endings), 0.0)
        self.observed_slots = observed_slots(self.observed_slots, self.poll, poll)
        self._forget_read(waiting, asked_at)
        since = [sent.tokens for sent in self.here if sent.at >= asked_at]
        self.sent_tokens, self.sent_requests = sum(since), len(since)
        self.was_idle = not ours
        self.poll, self.asked_at, self.stale = poll, asked_at, False

    def lost(self, ours: int, learned: SharedEstimate, now: float) -> bool:
        """Note that the engine wasn't to be asked; tells whether that is so for so long that nothing is known."""
        if self.poll is not None and now - self.poll.at_seconds <= STALE_SECONDS:
            return False
        self.stale = True
        self.observed_slots = inf
        # Nobody tells when whole answers' prompts are read.
        self._forget_read(0, now - STALE_SECONDS)
        if not ours:
            self.rest(learned, now)
            self.looked_at = now
        return True

    def rest(self, learned: SharedEstimate, now: float) -> None:
        """Doubt the slowness of a replica that has nothing to do: else nobody would try it again."""
        seconds = 0.0 if self.looked_at is None else max(now - self.looked_at, 0.0)
        self.pace = rested(self.pace, seconds)
        self.learnt = learnt_rested(self.learnt, learned.learnt, seconds)

    def learn_of(self, requests: float, tokens: int, seconds: float, speed: SpeedProfile | None) -> None:
        """Where no poll tells how fast an engine answers, one answer among so many does."""
        if speed is not None:
            self.pace = answered(self.pace, seconds / speed.step_at(requests), tokens, seconds)
        self.learnt = learnt_answering(self.learnt, 1.0, tokens, seconds)

    def _learn(self, poll: EngineMetrics, speed: SpeedProfile | None, learned: SharedEstimate) -> None:
        """Compare what an engine gave since the last look with what it should have given."""
        before = self.poll
        if before is None or before.generated_tokens is None or poll.generated_tokens is None or self.was_idle:
            return
        requests = ((before.running or 0.0) + (poll.running or 0.0)) / 2
        seconds = poll.at_seconds - before.at_seconds
        tokens = poll.generated_tokens - before.generated_tokens
        if not 0 < seconds < FRESH_SECONDS or tokens < 0 or not requests:
            return
        if not tokens and self._may_be_reading(poll.at_seconds):
            return
        if speed is not None:
            self.pace = answered(self.pace, speed.together_at(requests) * seconds, tokens, seconds)
        self.learnt = learnt_answering(self.learnt, requests, tokens, seconds)
        learned.learnt = learnt_answering(learned.learnt, requests, tokens, seconds)

    def _may_be_reading(self, now: float) -> bool:
        oldest = next((sent for sent in self.here if sent.unread), None)
        return oldest is not None and now - oldest.at < LONGEST_READING_SECONDS

    def _forget_read(self, waiting: float, asked_at: float) -> None:
        """Of answers that come whole nobody sees the first token: those that don't wait have been read, soon enough."""
        silent = [sent for sent in self.here if sent.unread and not sent.streams and sent.at < asked_at]
        for sent in silent[: max(len(silent) - int(waiting), 0)]:
            self.read(sent)
