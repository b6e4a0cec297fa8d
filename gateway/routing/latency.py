"""Estimate how long one more request would take on a replica, from what is known of the replica's load.

The terms of an estimate, in seconds:

=========  ==========================================================================================
queue      until a slot is free: requests beyond the slots, at the rate at which answers end
ahead      until prompts that were sent before have been read, as far as that takes longer than `queue`
kv         grows as the KV cache fills, because vLLM then preempts running requests
reading    the request's own prompt, without what the prefix cache holds
answering  the request's own answer
=========  ==========================================================================================

`queue + ahead + kv` is the wait that other requests cause; a rung spills by it. The last two belong to the request
(gateway.routing.score).
"""

from math import inf

import msgspec

from gateway.routing.engine_metrics import EngineMetrics
from gateway.routing.speed import DEFAULT_ANSWER_TOKENS, NO_SLOWDOWN, Slowdown, SpeedProfile
from serving.replica import Replica

# Weight of a filling KV cache: vLLM's own balancer begins at half (v1/engine/core_client.py), SMG's barrier has this
# scale and form. 0.15 s at 75 %, 0.6 at 90, 1.35 at 95, 7 at 99.
KV_BARRIER_SECONDS = 0.15
KV_FREE = 0.5
KV_FULL = 0.999
# From this usage on, requests that wait in an engine wait for room in its cache.
KV_CROWDED = 0.85

UNLIMITED_TOKENS = 2.0**53


class ReplicaMetrics(msgspec.Struct, frozen=True, gc=False):
    """What is known of one replica at one moment.

    `in_flight` requests are this gateway's, exact. `others` is how many more its engine had at the last poll, or an
    assumption where that is stale. `unread_tokens` belong to prompts whose answers have not begun, `sent_tokens` to the
    `sent_requests` that are in flight and were sent since the poll. `observed_slots` is the most that the engine ran
    while requests waited.
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
    slowdown: Slowdown = NO_SLOWDOWN
    speed: SpeedProfile | None = None
    answer_tokens: float = DEFAULT_ANSWER_TOKENS
    hash: int = 0


class LatencyEstimate(msgspec.Struct, frozen=True, gc=False):
    """The terms of what one more request costs on a replica; `token_seconds` and `answer_seconds` are for one token.

    `known` is False where the speed of the replica is unknown: then `requests` is all there is to compare. A speed that
    was learned by watching is known, but not `measured`. `reading` is the slowdown of reading that the terms include.
    `tools`: it may take requests with tools. `slots` are requests that are processed at once, None if unknown.
    `hash` is that of its id (gateway.routing.rendezvous).
    """

    id: str
    variant: str
    has_room: bool
    known: bool
    measured: bool
    stale: bool
    in_flight: int
    requests: float
    max_in_flight: int = 512
    context_tokens: float = UNLIMITED_TOKENS
    queue_seconds: float = 0.0
    ahead_seconds: float = 0.0
    kv_seconds: float = 0.0
    wait_seconds: float = 0.0
    fixed_seconds: float = 0.0
    step_seconds: float = 0.0
    token_seconds: float = 0.0
    answer_seconds: float = 0.0
    answer_tokens: float = DEFAULT_ANSWER_TOKENS
    reading: float = 1.0
    tools: bool = True
    slots: float | None = None
    hash: int = 0

    @property
    def work_seconds(self) -> float:
        """The least wait: without the term of the KV cache, whose real length is unknown."""
        return self.queue_seconds + self.ahead_seconds


def estimate_latency(metrics: ReplicaMetrics) -> LatencyEstimate:
    """Estimate what one more request would cost."""
    replica, in_flight = metrics.replica, metrics.in_flight
    # Of an external model nobody here knows what else it does: it is never compared by seconds.
    speed = metrics.speed if replica.external is None else None
    requests = in_flight + metrics.others
    context_tokens = float(replica.max_model_len_tokens or UNLIMITED_TOKENS)
    has_room = in_flight < replica.max_in_flight
    stale = metrics.stale and replica.external is None
    most, tools = replica.max_in_flight, replica.tools is not False
    if speed is None:
        known = (has_room, False, False, stale, in_flight, requests, most, context_tokens)
        return LatencyEstimate(replica.id, replica.variant, *known, tools=tools, hash=metrics.hash)
    slowdown, reading = metrics.slowdown, metrics.slowdown.reading
    slots = min(speed.slots or inf, metrics.observed_slots, _slots_in_cache(metrics))
    queue_seconds = 0.0
    if requests >= slots:
        finished_per_second = speed.together_at(slots) / (max(metrics.answer_tokens, 1.0) * slowdown.answering)
        queue_seconds = (requests + 1 - slots) / finished_per_second
    token_seconds = speed.reading_seconds * reading
    # Answers end at that rate with prompts read in between, so only the excess counts.
    ahead_seconds = max(metrics.unread_tokens * token_seconds - queue_seconds, 0.0)
    kv_seconds = _kv_seconds(metrics)
    wait_seconds = queue_seconds + ahead_seconds + kv_seconds
    step_seconds = speed.step_at(min(requests + 1, slots))
    return LatencyEstimate(
        id=replica.id,
        variant=replica.variant,
        has_room=has_room,
        known=True,
        measured=speed.slots is not None,
        stale=stale,
        in_flight=in_flight,
        requests=requests,
        max_in_flight=most,
        context_tokens=context_tokens,
        queue_seconds=queue_seconds,
        ahead_seconds=ahead_seconds,
        kv_seconds=kv_seconds,
        wait_seconds=wait_seconds,
        fixed_seconds=wait_seconds + step_seconds * reading,
        step_seconds=step_seconds * reading,
        token_seconds=token_seconds,
        answer_seconds=step_seconds * slowdown.answering,
        answer_tokens=metrics.answer_tokens,
        reading=reading,
        tools=tools,
        slots=slots if slots < inf else None,
        hash=metrics.hash,
    )


def kv_usage(metrics: ReplicaMetrics) -> float | None:
    """Estimate the share of the KV cache in use, from 0 to 1; None without a recent poll.

    It is what the poll said, without requests that have ended since, and with those sent since.
    """
    poll = metrics.poll
    if metrics.stale or poll is None or poll.kv_usage is None:
        return None
    capacity = poll.kv_capacity_tokens or (metrics.speed.kv_capacity_tokens if metrics.speed else None)
    ran = poll.running or 0.0
    still_there = metrics.in_flight + metrics.others - metrics.sent_requests
    left = min(max(still_there, 0.0) / ran, 1.0) if ran else 1.0
    return min(poll.kv_usage * left + (metrics.sent_tokens / capacity if capacity else 0.0), 1.0)


def _slots_in_cache(metrics: ReplicaMetrics) -> float:
    """How many requests a full cache holds: as many as run while others wait for room in it; inf if it is not full."""
    poll = metrics.poll
    if metrics.stale or poll is None or not poll.waiting or (poll.kv_usage or 0.0) < KV_CROWDED:
        return inf
    return max(poll.running or 0.0, 1.0)


def _kv_seconds(metrics: ReplicaMetrics) -> float:
    usage = kv_usage(metrics)
    if usage is None or usage <= KV_FREE:
        return 0.0
    usage = min(usage, KV_FULL)
    return KV_BARRIER_SECONDS * (usage - KV_FREE) / (1 - usage)
