"""Explain a decision: make it once more, and say for every rung and every replica what decided it."""

from collections.abc import Iterable, Iterator
from math import inf

import msgspec

from gateway.routing.breaker import HEALTHY, admissible
from gateway.routing.cluster_state import ClusterState
from gateway.routing.filters import is_overloaded
from gateway.routing.latency import LatencyEstimate
from gateway.routing.overload import NOT_OVERLOADED
from gateway.routing.pick import (
    Candidate,
    RungResult,
    any_context_fits,
    any_replica_able,
    decide,
    look_at_external,
    look_at_rung,
    without_external,
)
from gateway.routing.request import RoutingRequest
from gateway.routing.score import CostTerms, cost_terms
from gateway.routing.snapshot import AbsentReplica, Snapshot
from gateway.routing.spill import CLOSED, SpillGate, free_seconds, longest_wait_seconds, share_down


class ReplicaExplanation(msgspec.Struct, frozen=True):
    """One ready replica, and why it was not chosen (empty if it was).

    `rank` is its place in the order of attempts, None if it would not be asked. `terms` is None where its speed is
    unknown. `stale`: no recent poll, so its load is assumed to be that of its siblings.
    """

    replica: str
    variant: str
    rank: int | None
    requests: float
    terms: CostTerms | None
    stale: bool
    why_not: str = ""


class RungExplanation(msgspec.Struct, frozen=True):
    """One rung that may answer; None: the wait is unknown, or the gate is closed."""

    variant: str
    precision: str
    verdict: str
    wait_seconds: float | None
    spilling_seconds: float | None
    share_down: float


class RejectedVariant(msgspec.Struct, frozen=True):
    """A variant of the ladder that may not answer."""

    variant: str
    precision: str
    why: str


class Chosen(msgspec.Struct, frozen=True):
    """The replica that answers, and the reason that the client is given."""

    replica: str
    variant: str
    precision: str
    reason: str


class Explanation(msgspec.Struct, frozen=True):
    """One decision; `chosen` is None if no replica can be asked now, and `because` says why."""

    model: str
    chosen: Chosen | None
    because: str
    prompt_tokens: float
    answer_tokens: int | None
    spill_after_seconds: float
    rungs: tuple[RungExplanation, ...]
    candidates: tuple[ReplicaExplanation, ...]
    refused: tuple[RejectedVariant, ...]
    absent: tuple[AbsentReplica, ...]


def explain(
    request: RoutingRequest,
    cluster: ClusterState,
    now: float,
    *,
    absent: Iterable[AbsentReplica] = (),
    wait_seconds: float = inf,
) -> Explanation:
    """Explain the decision on a request that may wait so long; `absent` are replicas that are not ready."""
    target = request.target
    rejected = target.filter(request.floors, request.precisions).rejected
    return _DecisionTrace(request, cluster, now, wait_seconds).explanation(
        tuple([RejectedVariant(each.variant.name, each.variant.precision, each.why) for each in rejected]),
        tuple(absent),
    )


def explain_recorded(snapshot: Snapshot) -> Explanation:
    """Explain a decision that was made."""
    request, wait_seconds = snapshot.routing_request()
    return explain(request, snapshot.cluster(), snapshot.now_seconds, absent=snapshot.absent, wait_seconds=wait_seconds)


class _DecisionTrace:
    """One decision with the result of every rung, also of those below the one that answers."""

    def __init__(self, request: RoutingRequest, cluster: ClusterState, now: float, wait_seconds: float) -> None:
        self.request, self.cluster, self.now, self.limit_seconds = request, cluster, now, wait_seconds
        self.rungs = request.rungs
        self.on_replicas, needed = without_external(request), request.needed_tokens
        self.needed_tokens = needed if any_context_fits(request.rungs, cluster, needed) else 0.0
        self.results = list(self._look_at_rungs())
        self.candidate = decide(request, cluster, now).candidate
        self.refused = self.candidate is not None and self.candidate.exceeds(wait_seconds)

    def explanation(self, rejected: tuple[RejectedVariant, ...], absent: tuple[AbsentReplica, ...]) -> Explanation:
        request = self.request
        ladder = {rung.name for rung in self.rungs} | {each.variant for each in rejected}
        chosen = None if self.refused or self.candidate is None else _chosen(self.candidate)
        return Explanation(
            model=request.target.name,
            chosen=chosen,
            because=self._because(),
            prompt_tokens=request.prompt_tokens,
            answer_tokens=request.answer_tokens,
            spill_after_seconds=request.target.spill.after_seconds,
            rungs=tuple([self._rung(place) for place in range(len(self.rungs))]),
            candidates=self._replicas(),
            refused=rejected,
            absent=tuple([each for each in absent if each.variant in ladder]),
        )

    def _look_at_rungs(self) -> Iterator[RungResult]:
        passed_over = False
        for place in range(len(self.on_replicas.rungs)):
            result = look_at_rung(place, self.on_replicas, self.cluster, self.needed_tokens, self.now, passed_over)
            passed_over = passed_over or result.verdict != "no_replica"
            yield result
        passed_over = any_replica_able(self.on_replicas, self.cluster, self.now)
        for place in range(len(self.on_replicas.rungs), len(self.request.rungs)):
            yield look_at_external(place, self.request, self.cluster, self.now, passed_over)

    # The decision

    def _because(self) -> str:
        candidate = self.candidate
        if not self.request.rungs:
            return "no variant is good enough"
        if candidate is None:
            if any(self.cluster.estimates(rung.name) for rung in self.rungs):
                return "no replica has room: the request waits in the queue"
            return "no replica that may answer is ready"
        return self._because_suspect(candidate.replica) or self._because_soon(candidate)

    def _because_suspect(self, replica: LatencyEstimate) -> str | None:
        """Why a replica is asked that is known to fail; None if it is not."""
        if replica.id in self.cluster.silent:
            return "last resort: it answers no polls, but no other replica can be asked"
        if self.refused or not self._is_barred(replica):
            return None
        if len(list(self._ranking())) > 1:
            return "its breaker is open, but at most half of the replicas of a variant are left out"
        return "last resort: its breaker is open, but no other replica can be asked"

    def _because_soon(self, candidate: Candidate) -> str:
        replica, after_seconds = candidate.replica, self.request.target.spill.after_seconds
        wait = f"its wait is {replica.wait_seconds:.3f} s"
        if self.refused:
            return f"refused (429): the soonest is {replica.id}, {wait}, the request may wait {self.limit_seconds:g} s"
        if candidate.variant.is_external:
            return self._because_external()
        if not replica.known:
            return "speed unknown: the shortest queue of the best rung that has a replica"
        if replica.wait_seconds > after_seconds and self._result(candidate).verdict == "answers":
            longest = longest_wait_seconds(self.request.target.spill, "here")
            return f"{wait}, and the conversation stays on its rung up to {longest:g} s"
        if replica.wait_seconds > after_seconds:
            return f"lowest cost of all: {wait}, and no rung is within spill.after_seconds ({after_seconds:g})"
        above = range(self.rungs.index(candidate.variant))
        passed = [f"{self.rungs[place].name} {self._verdict(place)}" for place in above]
        return "; ".join([f"{wait}, spill.after_seconds is {after_seconds:g}", *passed])

    def _because_external(self) -> str:
        """Why an external model is asked: what each rung of replicas says."""
        after_seconds = self.request.target.spill.after_seconds
        rungs = [f"{self.rungs[place].name} {self._verdict(place)}" for place in range(len(self.on_replicas.rungs))]
        if not rungs:
            return "external: no rung of replicas may answer"
        return f"external: no replica can answer within spill.after_seconds ({after_seconds:g}); {'; '.join(rungs)}"

    # Rungs

    def _rung(self, place: int) -> RungExplanation:
        request, result, rung = self.request, self.results[place], self.rungs[place]
        gate = self._gate(place)
        known = result.candidate is not None and result.candidate.replica.known
        wait_seconds = result.wait_seconds if known else None
        return RungExplanation(
            rung.name,
            rung.precision,
            self._verdict(place),
            wait_seconds,
            self.now - gate.since_seconds if gate.spilling else None,
            share_down(gate, request.target.spill, inf if wait_seconds is None else wait_seconds),
        )

    def _result(self, candidate: Candidate) -> RungResult:
        return self.results[self.rungs.index(candidate.variant)]

    def _gate(self, place: int) -> SpillGate:
        """The gate of a rung as the decision left it."""
        key = self.request.target.name, self.rungs[place].name
        return self.results[place].gate or self.cluster.gates.get(key, CLOSED)

    def _verdict(self, place: int) -> str:
        result = self.results[place]
        if result.verdict == "no_replica":
            return "has no replica to ask"
        if result.candidate is None:
            return "has no room"
        if self.candidate is not None and self.rungs[place] is self.candidate.variant:
            return "answers"
        if result.verdict == "spills":
            return "spills this request"
        if result.verdict == "keeps_below":
            free, dwell_seconds = free_seconds(self._gate(place), self.now), self.request.target.spill.dwell_seconds
            return f"leaves the conversation where it is: free for {free:.1f} of {dwell_seconds:g} s"
        if result.verdict == "too_slow":
            return f"is too slow: its wait is {result.candidate.replica.wait_seconds:.3f} s"
        return "could answer"

    # Replicas

    def _replicas(self) -> tuple[ReplicaExplanation, ...]:
        """Every ready replica, in the order of attempts: each after those before it have failed."""
        ranks = {replica_id: rank for rank, replica_id in enumerate(self._ranking(), start=1)}
        explained = [
            ReplicaExplanation(
                replica.id,
                rung.name,
                ranks.get(replica.id),
                replica.requests,
                cost_terms(replica, self.request) if replica.known else None,
                replica.stale,
                self._why_not(place, replica),
            )
            for place, rung in enumerate(self.rungs)
            for replica in self.cluster.estimates(rung.name)
        ]
        return tuple(sorted(explained, key=lambda each: (each.rank or inf, each.terms.total if each.terms else inf)))

    def _ranking(self) -> Iterator[str]:
        request = self.request
        while (candidate := decide(request, self.cluster, self.now).candidate) is not None:
            yield candidate.replica.id
            request = msgspec.structs.replace(request, tried=request.tried | {candidate.replica.id})

    def _why_not(self, place: int, replica: LatencyEstimate) -> str:
        if self.candidate is not None and replica.id == self.candidate.replica.id:
            return f"its wait exceeds that of the request: {self.limit_seconds:g} s" if self.refused else ""
        return self._filtered_out(replica) or self._outscored(place, replica)

    def _filtered_out(self, replica: LatencyEstimate) -> str:
        overloads, now = self.cluster.overloads, self.now
        if replica.id in self.request.tried:
            return "it has failed this request"
        if silence := self.cluster.silent.get(replica.id):
            return f"{silence}: it answers no polls and sends nothing"
        if self._is_barred(replica):
            return f"its breaker is {self.cluster.breakers.get(replica.id, HEALTHY).state(now).replace('_', '-')}"
        if not replica.has_room:
            return f"full: {replica.in_flight} of at most {replica.max_in_flight} requests in flight"
        if is_overloaded(replica, overloads, now):
            overload = overloads.get(replica.id, NOT_OVERLOADED)
            left = f"spared for {overload.until - now:.2f} s" if overload.active(now) else f"limit {overload.limit:g}"
            return f"overloaded: it refused a request, {left}"
        if self.needed_tokens > replica.context_tokens:
            return f"context too short: {replica.context_tokens:g} tokens"
        if self.request.tools and not replica.tools:
            return "it takes no tools"
        return ""

    def _outscored(self, place: int, replica: LatencyEstimate) -> str:
        candidate, result = self.candidate, self.results[place]
        assert candidate is not None, "a replica that can be asked is asked if no other is"
        if self.rungs[place].is_external and not candidate.variant.is_external:
            return "external models are asked last: a replica answers soon enough"
        if candidate.variant is self.rungs[place]:
            return self._costs_more(replica, candidate.replica)
        if result.verdict == "spills":
            return "its rung spills this request"
        if result.verdict == "keeps_below":
            return f"the conversation stays on {candidate.variant.name}"
        if result.verdict == "too_slow" and result.candidate is not None:
            if candidate.replica.wait_seconds > self.request.target.spill.after_seconds:
                return self._costs_more(replica, candidate.replica)
            best = result.candidate.replica
            return f"its rung is too slow: the wait of {best.id} is {best.wait_seconds:.3f} s"
        if self.rungs.index(candidate.variant) < place:
            return f"{candidate.variant.name} is a better rung and answers"
        return "its rung is no sooner than the one above that spills this request"

    def _costs_more(self, replica: LatencyEstimate, chosen: LatencyEstimate) -> str:
        if not (chosen.known and replica.known):
            return f"{replica.requests:g} requests, {chosen.id} has {chosen.requests:g}"
        seconds = cost_terms(replica, self.request).total - cost_terms(chosen, self.request).total
        if seconds > 0:
            return f"{seconds:.3f} s later than {chosen.id}"
        if seconds < 0 and self.request.placement is not None:
            return f"{-seconds:.3f} s sooner, but the conversation stays on {chosen.id}"
        if self.request.session_hash is not None:
            return f"{-seconds:.3f} s sooner, but every gateway sends the conversation to {chosen.id}"
        return f"same cost as {chosen.id}; equal replicas take turns"

    def _is_barred(self, replica: LatencyEstimate) -> bool:
        """Return whether a breaker keeps requests from a replica, unless too many of its siblings are worse."""
        if not self.cluster.breakers:
            return False
        siblings = [each.id for each in self.cluster.estimates(replica.variant) if each.id not in self.cluster.silent]
        return replica.id not in admissible(siblings, self.cluster.breakers, self.now).first


def _chosen(candidate: Candidate) -> Chosen:
    variant = candidate.variant
    return Chosen(candidate.replica.id, variant.name, variant.precision, candidate.reason)
