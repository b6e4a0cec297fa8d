"""Builds a status from what is known at one moment. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite
from typing import Any

import msgspec

from config.variant import MEASURES, Variant
from gateway.routing.cluster_state import ClusterState
from gateway.routing.engine_metrics import PollResult
from gateway.routing.latency import LatencyEstimate
from gateway.routing.pick import decide
from gateway.routing.request import RoutingRequest
from gateway.routing.snapshot import floor_limits
from gateway.routing.speed import SpeedProfile
from gateway.routing.spill import CLOSED, share_down
from gateway.routing.target import Catalog, Target
from gateway.status.traffic import Served, Totals, TrafficSample, answered_lately, traffic_status
from gateway.status.values import (
    AliasStatus,
    AnswerStatus,
    CanaryStatus,
    ErrorStatus,
    GatewayStatus,
    MeasureStatus,
    ReplicaView,
    RungState,
    RungStatus,
    SpeedStatus,
    SpillGateStatus,
    Status,
    VariantStatus,
)
from serving.replica import ReplicaStatus, State


@dataclass(frozen=True, slots=True)
class StatusFacts:
    """What a status is built from; `now` is on the monotonic clock, `canaries` are variant and weight by alias."""

    gateway: GatewayStatus
    now: float
    catalog: Catalog
    cluster: ClusterState
    replicas: Sequence[ReplicaStatus]
    polls: Mapping[str, PollResult]
    breakers: Mapping[str, str]
    waiting: Mapping[str, int]
    speeds: Mapping[str, SpeedProfile]
    canaries: Mapping[str, tuple[str, float]]
    history: Sequence[TrafficSample]
    recent: Sequence[TrafficSample]
    rollouts: Sequence[dict[str, Any]]
    errors: Sequence[ErrorStatus]


def status_of(facts: StatusFacts) -> Status:
    """Build the status."""
    lately = answered_lately(facts.recent)
    return Status(
        gateway=facts.gateway,
        aliases=tuple([_alias(name, facts, lately) for name in facts.catalog.aliases]),
        variants=tuple([_variant(variant, facts) for variant in facts.catalog.variants.values()]),
        replicas=tuple([_replica(status, facts) for status in facts.replicas]),
        traffic=traffic_status(facts.history, facts.recent),
        rollouts=tuple(facts.rollouts),
        errors=tuple(facts.errors),
    )


# Aliases


def _alias(name: str, facts: StatusFacts, lately: Mapping[Served, Totals]) -> AliasStatus:
    catalog = facts.catalog
    target, own = catalog.resolve(name), {served: each for served, each in lately.items() if served[0] == name}
    answered = sum(each.requests - each.failed for each in own.values())
    answers_now = _answers_now(target, facts)
    rejected = {each.variant.name: each.why for each in target.filter((), None).rejected}
    ladder = [catalog.variants[variant] for variant in catalog.aliases[name].ladder]
    rungs = [_rung(variant, target, rejected.get(variant.name), answers_now, facts) for variant in ladder]
    canary = facts.canaries.get(name)
    return AliasStatus(
        name=name,
        floor=floor_limits(target.floor),
        spill_after_seconds=target.spill.after_seconds,
        waiting=facts.waiting.get(name, 0),
        answers_now=answers_now,
        rungs=tuple([_with_share(rung, _requests(rung.variant, own), answered) for rung in rungs]),
        canary=None if canary is None else _canary(*canary, catalog, own, answered),
        requests=round(sum(each.requests for each in own.values())),
        failed=round(sum(each.failed for each in own.values())),
    )


def _answers_now(target: Target, facts: StatusFacts) -> AnswerStatus | None:
    """Who would answer a request without a prompt that belongs to no conversation."""
    candidate = decide(RoutingRequest(target, target.permitted), facts.cluster, facts.now).candidate
    if candidate is None:
        return None
    variant, replica = candidate.variant, candidate.replica
    return AnswerStatus(replica.id, variant.name, variant.precision, candidate.reason, _wait_seconds([replica]))


def _rung(
    variant: Variant, target: Target, rejected: str | None, answers_now: AnswerStatus | None, facts: StatusFacts
) -> RungStatus:
    estimates = facts.cluster.estimates(variant.name)
    wait_seconds = _wait_seconds(estimates)
    gate = _gate(variant.name, target, wait_seconds, facts)
    state: RungState = "ready"
    if rejected is not None:
        state = "rejected"
    elif not estimates:
        state = "no_replica"
    elif answers_now is not None and answers_now.variant == variant.name:
        state = "answers"
    elif gate.state == "spilling":
        state = "spilling"
    replicas = sum(variant.name in status.replica.variants for status in facts.replicas)
    return RungStatus(
        *(variant.name, variant.precision, state, rejected, len(estimates), replicas, wait_seconds, gate), 0, None
    )


def _gate(rung: str, target: Target, wait_seconds: float | None, facts: StatusFacts) -> SpillGateStatus:
    gate = facts.cluster.gates.get((target.name, rung), CLOSED)
    if not gate.spilling:
        return SpillGateStatus("closed", None, 0.0)
    share = share_down(gate, target.spill, inf if wait_seconds is None else wait_seconds)
    return SpillGateStatus("spilling", round(facts.now - gate.since_seconds, 3), round(share, 3))


def _requests(variant: str, own: Mapping[Served, Totals]) -> float:
    """How many requests a variant has answered."""
    return sum(each.requests - each.failed for (_, name, _), each in own.items() if name == variant)


def _with_share(rung: RungStatus, requests: float, answered: float) -> RungStatus:
    return msgspec.structs.replace(rung, requests=round(requests), share=_share(requests, answered))


def _share(requests: float, answered: float) -> float | None:
    return round(requests / answered, 4) if answered > 0 else None


def _canary(
    variant: str, weight: float, catalog: Catalog, own: Mapping[Served, Totals], answered: float
) -> CanaryStatus:
    known, requests = catalog.variants.get(variant), _requests(variant, own)
    precision = "unknown" if known is None else known.precision
    return CanaryStatus(variant, precision, weight, round(requests), _share(requests, answered))


def _wait_seconds(estimates: Iterable[LatencyEstimate]) -> float | None:
    """The shortest wait on replicas of known speed; None if there is none."""
    shortest = min((each.wait_seconds for each in estimates if each.known), default=inf)
    return round(shortest, 4) if isfinite(shortest) else None


# Variants


def _variant(variant: Variant, facts: StatusFacts) -> VariantStatus:
    manifest, quality = variant.manifest, variant.quality
    measures = [(name, getattr(quality, name), quality.bound(name)) for name in MEASURES]
    return VariantStatus(
        name=variant.name,
        id=variant.id,
        precision=variant.precision,
        scheme=manifest.scheme.name if manifest else None,
        base=manifest.base.name if manifest else None,
        bytes=manifest.bytes if manifest else None,
        source=quality.source,
        verdict=manifest.quality.verdict if manifest else None,
        measures=tuple([MeasureStatus(name, value, bound) for name, value, bound in measures if bound is not None]),
        speed=_speed(facts.speeds.get(variant.name)),
        replicas_ready=len(facts.cluster.estimates(variant.name)),
    )


def _speed(profile: SpeedProfile | None) -> SpeedStatus | None:
    if profile is None:
        return None
    reading = 1 / profile.reading_seconds if profile.reading_seconds > 0 else 0.0
    return SpeedStatus(
        round(1 / profile.step_seconds[0], 2), round(max(profile.together), 2), round(reading, 1), profile.slots
    )


# Replicas


def _replica(status: ReplicaStatus, facts: StatusFacts) -> ReplicaView:
    replica, ready = status.replica, status.state is State.READY
    poll = facts.polls[replica.id].poll if replica.id in facts.polls else None
    own = [each for each in facts.cluster.estimates(replica.variant) if each.id == replica.id] if ready else []
    return ReplicaView(
        id=replica.id,
        variant=replica.variant,
        precision=replica.precision,
        url=replica.url,
        source=status.source,
        state=status.state.value,
        state_seconds=round(facts.now - status.since_seconds, 1),
        reason=status.reason,
        tools=replica.tools,
        context_tokens=replica.max_model_len_tokens,
        in_flight=status.in_flight,
        max_in_flight=replica.max_in_flight,
        running=poll.running if poll else None,
        waiting=poll.waiting if poll else None,
        kv_usage=poll.kv_usage if poll else None,
        wait_seconds=_wait_seconds(own),
        load_known=any(not each.stale for each in own),
        breaker=facts.breakers.get(replica.id, "closed"),
        silence=facts.cluster.silent.get(replica.id, "responsive"),
    )
