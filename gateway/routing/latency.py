"""What a replica can promise the next request: what is known of its load, turned into seconds.

A request waits until those before it have left a place (`queue`), until prompts before its own that haven't been read
by then are (`ahead`; the rate at which answers end holds with prompts read in between), and longer as the KV cache
fills, for then vLLM puts running requests back into its queue (`kv`). That much is the others' doing. Reading its own
prompt and answering it come on top, and what the prefix cache holds comes off.
"""

from math import inf

import msgspec

from gateway.routing.engine_metrics import EngineMetrics
from gateway.routing.request import Ask
from gateway.routing.speed import NO_SLOWDOWN, USUAL_ANSWER_TOKENS, Slowdown, SpeedProfile
from serving.replica import Replica

# How much a fuller KV cache weighs: vLLM's own balancer begins at half (v1/engine/core_client.py), SMG's barrier has
# this scale and form. 0.15 s at 75 %, 0.6 at 90, 1.35 at 95, 7 at 99.
KV_BARRIER_SECONDS = 0.15
KV_FREE = 0.5
KV_FULL = 0.999
# From here on, who waits in an engine waits for room in its cache.
KV_CROWDED = 0.85


UNLIMITED_TOKENS = 2.0**53


class ReplicaMetrics(msgspec.Struct, frozen=True, gc=False):
    """What is known of one replica at a moment.

    `in_flight` requests are ours, exactly; `others` is how many more its engine had when it was last asked, or how many
    they are believed to be where that is too old. `unread_tokens` are of prompts whose answers haven't begun,
    `sent_tokens` of the `sent_requests` that are there and came since the poll. Its engine didn't take more than
    `places_seen` when it had a queue.
    """

    replica: Replica
    in_flight: int = 0
    others: float = 0.0
    unread_tokens: float = 0.0
    sent_tokens: float = 0.0
    sent_requests: int = 0
    poll: EngineMetrics | None = None
    stale: bool = True
    observed_slots: float = inf
    pace: Slowdown = NO_SLOWDOWN
    speed: SpeedProfile | None = None
    answer_tokens: float = USUAL_ANSWER_TOKENS


class LatencyEstimate(msgspec.Struct, frozen=True, gc=False):
    """Terms of what one more request costs on a replica; `token_seconds` and `answer_seconds` are a token's.

    Without a known speed nothing is in seconds: `known` is False, and `requests` is all there is to go by. One that was
    only learned by watching is known, but not `measured`. It reads `reading` times as slowly as its speed says.
    """

    replica: Replica
    id: str
    has_room: bool
    known: bool
    measured: bool
    stale: bool
    in_flight: int
    requests: float
    context_tokens: float = UNLIMITED_TOKENS
    queue_seconds: float = 0.0
    ahead_seconds: float = 0.0
    kv_seconds: float = 0.0
    wait_seconds: float = 0.0
    fixed_seconds: float = 0.0
    step_seconds: float = 0.0
    token_seconds: float = 0.0
    answer_seconds: float = 0.0
    answer_tokens: float = USUAL_ANSWER_TOKENS
    reading: float = 1.0

    @property
    def work_seconds(self) -> float:
        """How long a request waits at least: without what a full KV cache may add, of which nobody knows how long."""
        return self.queue_seconds + self.ahead_seconds


def estimate_latency(standing: ReplicaMetrics) -> LatencyEstimate:
    """Work out what a replica can promise."""
    replica, in_flight = standing.replica, standing.in_flight
    requests = in_flight + standing.others
    context_tokens = float(replica.max_model_len_tokens or UNLIMITED_TOKENS)
    has_room = in_flight < replica.max_in_flight
    speed = standing.speed
    if speed is None:
        return LatencyEstimate(
            replica, replica.id, has_room, False, False, standing.stale, in_flight, requests, context_tokens
        )
    pace, reading = standing.pace, standing.pace.reading
    slots = min(speed.slots or inf, standing.observed_slots, _places_in_cache(standing))
    queue_seconds = 0.0
    if requests >= slots:
        finished_per_second = speed.together_at(slots) / (max(standing.answer_tokens, 1.0) * pace.answering)
        queue_seconds = (requests + 1 - slots) / finished_per_second
    token_seconds = speed.reading_seconds * reading
    ahead_seconds = max(standing.unread_tokens * token_seconds - queue_seconds, 0.0)
    kv_seconds = _kv_seconds(standing)
    wait_seconds = queue_seconds + ahead_seconds + kv_seconds
    step_seconds = speed.step_at(min(requests + 1, slots))
    return LatencyEstimate(
        replica=replica,
        id=replica.id,
        has_room=has_room,
        known=True,
        measured=speed.slots is not None,
        stale=standing.stale,
        in_flight=in_flight,
        requests=requests,
        context_tokens=context_tokens,
        queue_seconds=queue_seconds,
        ahead_seconds=ahead_seconds,
        kv_seconds=kv_seconds,
        wait_seconds=wait_seconds,
        fixed_seconds=wait_seconds + step_seconds * reading,
        step_seconds=step_seconds * reading,
        token_seconds=token_seconds,
        answer_seconds=step_seconds * pace.answering,
        answer_tokens=standing.answer_tokens,
        reading=reading,
    )


def answer_length(estimate_latency: LatencyEstimate, ask: Ask) -> float:
    """How many tokens an answer is expected to have: the usual ones, or what the client wants at most."""
    usual = estimate_latency.answer_tokens
    return usual if ask.answer_tokens is None else min(usual, ask.answer_tokens)


def seconds_for(estimate_latency: LatencyEstimate, ask: Ask, answer_tokens: float, cached_tokens: float) -> float:
    """What a request costs on a replica, until it is answered."""
    read_tokens = ask.prompt_tokens - cached_tokens
    reading_seconds = read_tokens * estimate_latency.token_seconds if read_tokens > 0 else 0.0
    return estimate_latency.fixed_seconds + reading_seconds + answer_tokens * estimate_latency.answer_seconds


def kv_usage(standing: ReplicaMetrics) -> float | None:
    """How full the KV cache is by now, of 1; None where nothing recent tells.

    As polled, without what has ended since, and with what was sent since.
    """
    poll = standing.poll
    if standing.stale or poll is None or poll.kv_usage is None:
        return None
    capacity = poll.kv_capacity_tokens or (standing.speed.kv_capacity_tokens if standing.speed else None)
    ran = poll.running or 0.0
    still_there = standing.in_flight + standing.others - standing.sent_requests
    left = min(max(still_there, 0.0) / ran, 1.0) if ran else 1.0
    return min(poll.kv_usage * left + (standing.sent_tokens / capacity if capacity else 0.0), 1.0)


def _places_in_cache(standing: ReplicaMetrics) -> float:
    """How many requests find a place in a cache that is full: as many as run while others wait for room in it."""
    poll = standing.poll
    if standing.stale or poll is None or not poll.waiting or (poll.kv_usage or 0.0) < KV_CROWDED:
        return inf
    return max(poll.running or 0.0, 1.0)


def _kv_seconds(standing: ReplicaMetrics) -> float:
    usage = kv_usage(standing)
    if usage is None or usage <= KV_FREE:
        return 0.0
    usage = min(usage, KV_FULL)
    return KV_BARRIER_SECONDS * (usage - KV_FREE) / (1 - usage)
