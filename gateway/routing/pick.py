"""The decision: filter, score, pick.

A ladder is looked at from its best rung down. On each rung the replicas are filtered, scored by what the request costs
there, and the best is picked; the rung's spill gate has the last word. The first rung whose pick waits no longer than
`spill.after_seconds` answers, unless its gate sends this request down. A conversation stays on its rung as long as
gateway.routing.spill lets it. If no rung is soon enough, the cheapest pick of all answers. At most half of a variant's
replicas are left out behind open breakers; the least bad of the others are asked like any other, or, if they time out,
as the last resort below every rung. Replicas that send nothing any more are left out, however many they are.

External models are behind all of that, whatever is known of their speed: one answers only what no rung of replicas
can, or what would wait there for longer than `spill.after_seconds`. They are part of no gate and no comparison, and no
conversation lives on one.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from math import inf
from operator import attrgetter
from typing import Literal

import msgspec

from config.schema import Spill
from config.variant import Variant
from gateway.routing.breaker import admissible
from gateway.routing.cluster_state import ClusterState
from gateway.routing.filters import admitted, filter_replicas, without_room_if_overloaded
from gateway.routing.latency import LatencyEstimate
from gateway.routing.rendezvous import highest_weight
from gateway.routing.request import NOTHING_CACHED, RoutingRequest
from gateway.routing.score import cost, costs
from gateway.routing.sessions import Placement
from gateway.routing.spill import (
    CLOSED,
    PAUSE_SECONDS,
    Home,
    RungKey,
    SpillGate,
    Verdict,
    abandoned,
    evaluate,
    evaluate_last,
    longest_wait_seconds,
    update,
)

Reason = Literal["preferred", "spill", "floor", "pinned", "canary", "fallback"]

# More concurrent turns of one session are not a conversation: many clients share one `user`, for example.
MAX_CONCURRENT_TURNS = 4
# A conversation stays on its replica unless another is cheaper by this share and this much.
STICKY_SHARE = 1.1
STICKY_SECONDS = 0.05
# One that this gateway has not seen goes to the replica of the highest weight within a wider margin: all gateways must
# choose the same one, on loads that each of them knows a little differently; and not all of them the least loaded one.
HOME_SHARE = 1.6
# A shorter wait refuses no request: estimates are not better than this.
MIN_REFUSED_WAIT_SECONDS = 1.0


class Candidate(msgspec.Struct, frozen=True, gc=False):
    """The replica that a rung picks for a request, and the reason that its client is given."""

    replica: LatencyEstimate
    variant: Variant
    reason: Reason

    def exceeds(self, wait_seconds: float) -> bool:
        """Return whether the request would wait longer than that; False where the speed is only a guess."""
        replica = self.replica
        return replica.measured and replica.work_seconds > max(wait_seconds, MIN_REFUSED_WAIT_SECONDS)


class RungResult(msgspec.Struct, frozen=True, gc=False):
    """What one rung offers: its candidate, whether it answers, and its gate if that changed.

    `no_replica`: no replica can be asked. `wait_seconds` is how long the candidate keeps the request waiting.
    """

    candidate: Candidate | None
    verdict: Verdict | Literal["no_replica"]
    gate: SpillGate | None = None
    wait_seconds: float = inf


_requests = attrgetter("requests")
NO_REPLICA = RungResult(None, "no_replica")
NO_GATES: Mapping[RungKey, SpillGate] = {}


class Decision(msgspec.Struct, frozen=True, gc=False):
    """The candidate that answers, None if no replica has room; and the gates that changed."""

    candidate: Candidate | None
    gates: Mapping[RungKey, SpillGate]


def decide(request: RoutingRequest, cluster: ClusterState, now: float) -> Decision:
    """Choose a replica among those of the rungs that may answer."""
    if request.rungs and request.rungs[-1].is_external:
        return _decide_with_external(request, cluster, now)
    return _decide_on_replicas(request, cluster, now)


def _decide_with_external(request: RoutingRequest, cluster: ClusterState, now: float) -> Decision:
    """Ask an external model if no rung of replicas answers soon enough; they are the last rungs."""
    on_replicas = without_external(request)
    decision = _descend(on_replicas, cluster, request.needed_tokens, now)
    candidate = decision.candidate
    if candidate is not None and not waits_too_long(candidate, on_replicas, now):
        return decision
    passed_over = any_replica_able(on_replicas, cluster, now)
    for place in range(len(on_replicas.rungs), len(request.rungs)):
        external = look_at_external(place, request, cluster, now, passed_over).candidate
        if external is not None:
            return Decision(external, decision.gates)
    if candidate is not None:
        return decision
    decision = _decide_on_replicas(on_replicas, cluster, now)
    if decision.candidate is not None:
        return decision
    return Decision(last_resort(request, cluster, 0.0, now), decision.gates)


def _decide_on_replicas(request: RoutingRequest, cluster: ClusterState, now: float) -> Decision:
    needed_tokens = request.needed_tokens
    decision = _descend(request, cluster, needed_tokens, now)
    if decision.candidate is not None:
        return decision
    if needed_tokens and not any_context_fits(request.rungs, cluster, needed_tokens, request.tools):
        # No context is long enough: the engine's own error says so best.
        needed_tokens = 0.0
        decision = _descend(request, cluster, needed_tokens, now)
    if decision.candidate is None and (cluster.breakers or cluster.silent):
        return Decision(last_resort(request, cluster, needed_tokens, now), decision.gates)
    return decision


def without_external(request: RoutingRequest) -> RoutingRequest:
    """The same request for the rungs of replicas only."""
    return msgspec.structs.replace(request, rungs=tuple([rung for rung in request.rungs if not rung.is_external]))


def waits_too_long(candidate: Candidate, request: RoutingRequest, now: float) -> bool:
    """Return whether a request would wait for longer than its alias allows, so that an external model is worth it."""
    replica, home = candidate.replica, home_place(request.placement, request.rungs, now)
    at_home = home is not None and request.rungs[home] is candidate.variant
    return replica.known and replica.wait_seconds > longest_wait_seconds(
        request.target.spill, "here" if at_home else "none"
    )


def any_replica_able(request: RoutingRequest, cluster: ClusterState, now: float) -> bool:
    """Return whether any replica could be asked if it had room: a request that passes it is spilled."""
    for rung in request.rungs:
        ready = admitted(cluster.estimates(rung.name), cluster, now)
        if filter_replicas(ready, request.tried, request.needed_tokens, request.tools):
            return True
    return False


def look_at_external(
    place: int, request: RoutingRequest, cluster: ClusterState, now: float, passed_over: bool
) -> RungResult:
    """Filter and pick on one external rung: it has no gate, and its speed does not matter."""
    rung = request.rungs[place]
    able = filter_replicas(admitted(cluster.estimates(rung.name), cluster, now), request.tried, 0.0, request.tools)
    roomy = [each for each in able if each.has_room]
    if not roomy:
        return RungResult(None, "too_slow") if able else NO_REPLICA
    best = shortest_queue(roomy, request.turn)
    candidate = Candidate(best, rung, _reason(place, request, passed_over))
    return RungResult(candidate, "answers", wait_seconds=0.0)


def look_at_rung(
    place: int, request: RoutingRequest, cluster: ClusterState, needed_tokens: float, now: float, passed_over: bool
) -> RungResult:
    """Filter, score and pick on one rung, then ask its gate; `passed_over`: a better rung could have answered."""
    rung, spill = request.rungs[place], request.target.spill
    ready = cluster.estimates(rung.name)
    if cluster.breakers or cluster.overloads or cluster.silent:
        ready = admitted(ready, cluster, now)
    able = filter_replicas(ready, request.tried, needed_tokens, request.tools)
    gates = cluster.gates
    gate = gates.get((request.target.name, rung.name), CLOSED) if gates else CLOSED
    if not able:
        return NO_REPLICA if ready or rung is request.rungs[-1] else _abandoned(gate, request, place, now)
    best = pick(able, request, spill)
    candidate = None if best is None else Candidate(best, rung, _reason(place, request, passed_over))
    if best is not None and not best.known:
        after = update(gate, spill, 0.0, now) if gate.spilling else gate
        return RungResult(candidate, "answers", None if after is gate else after, 0.0)
    wait_seconds = inf if best is None else best.wait_seconds
    home = home_of(request.placement, request.rungs, place, now)
    if len(able) < len(ready) or rung is request.rungs[-1] or _waits_for_its_cache(best, able, request, spill):
        # A wait that only this request meets must not open the gate for others; the last rung has none below it.
        return RungResult(candidate, evaluate_last(spill, wait_seconds, home), None, wait_seconds)
    after, verdict = evaluate(gate, spill, wait_seconds, now, home)
    return RungResult(candidate, verdict, None if after is gate else after, wait_seconds)


def pick(able: Sequence[LatencyEstimate], request: RoutingRequest, spill: Spill) -> LatencyEstimate | None:
    """Pick the cheapest replica with room; a slower start is not worth more than `spill.after_seconds` of cost.

    Returns None if none has room. Where the speed of one is unknown, the shortest queue is picked instead.
    """
    roomy = [each for each in able if each.has_room]
    if len(roomy) <= 1:
        return roomy[0] if roomy else None
    best = _best(roomy, request)
    if best.wait_seconds <= spill.after_seconds:
        return best
    soon = [each for each in roomy if each.wait_seconds <= spill.after_seconds]
    if not soon:
        return best
    soonest = _best(soon, request)
    return best if cost(soonest, request) > cost(best, request) + spill.after_seconds else soonest


def shortest_queue(roomy: Sequence[LatencyEstimate], turn: int) -> LatencyEstimate:
    """Pick the replica with the fewest requests; equals take turns."""
    first = turn % len(roomy)
    return min([*roomy[first:], *roomy[:first]] if first else roomy, key=_requests)


def home_of(placement: Placement | None, rungs: Sequence[Variant], place: int, now: float) -> Home:
    """Return where a conversation lives, seen from the rung at `place`."""
    home = home_place(placement, rungs, now)
    if home is None or home < place:
        return "none"
    return "here" if home == place else "below"


def home_place(placement: Placement | None, rungs: Sequence[Variant], now: float) -> int | None:
    """Return the rung that a conversation lives on: the one that answered it last.

    None if that may not answer, the conversation has paused, or the session is shared.
    """
    if placement is None or placement.running > MAX_CONCURRENT_TURNS or placement.idle_seconds(now) >= PAUSE_SECONDS:
        return None
    for place, rung in enumerate(rungs):
        if rung.name == placement.variant:
            return place
    return None


def last_resort(request: RoutingRequest, cluster: ClusterState, needed_tokens: float, now: float) -> Candidate | None:
    """Pick the least bad of the replicas that breakers bar, on the highest rung that has one.

    If no replica is responsive, those count that are silent, but not those that hang.
    """
    all_silent = all(each.id in cluster.silent for each in ready_replicas(request.rungs, cluster, request.tools))
    for place, rung in enumerate(request.rungs):
        barred = last_resorts(rung.name, cluster, now, all_silent)
        able = [each for each in filter_replicas(barred, request.tried, needed_tokens, request.tools) if each.has_room]
        if able:
            best = shortest_queue(able, request.turn)
            return Candidate(best, rung, _reason(place, request, False))
    return None


def last_resorts(variant_name: str, cluster: ClusterState, now: float, all_silent: bool) -> Sequence[LatencyEstimate]:
    estimates, silent = cluster.estimates(variant_name), cluster.silent
    if all_silent:
        barred: Collection[str] = [each.id for each in estimates if silent.get(each.id) == "silent"]
    else:
        responsive = [each.id for each in estimates if each.id not in silent]
        barred = admissible(responsive, cluster.breakers, now).last_resort
    return without_room_if_overloaded([each for each in estimates if each.id in barred], cluster, now)


def any_context_fits(
    rungs: Iterable[Variant], cluster: ClusterState, needed_tokens: float, tools: bool = False
) -> bool:
    """Return whether the context of any ready replica, one that takes `tools`, is long enough."""
    return any(needed_tokens <= each.context_tokens for each in ready_replicas(rungs, cluster, tools))


def ready_replicas(rungs: Iterable[Variant], cluster: ClusterState, tools: bool) -> Iterable[LatencyEstimate]:
    ready = (each for rung in rungs for each in cluster.estimates(rung.name))
    return (each for each in ready if each.tools) if tools else ready


# The ladder


def _descend(request: RoutingRequest, cluster: ClusterState, needed_tokens: float, now: float) -> Decision:
    """Go down the ladder until a rung answers."""
    gates = NO_GATES
    spilled: Candidate | None = None
    too_slow: list[Candidate] = []
    passed_over = False
    for place, rung in enumerate(request.rungs):
        result = look_at_rung(place, request, cluster, needed_tokens, now, passed_over)
        if not place and result.verdict == "answers" and result.gate is None:
            return Decision(result.candidate, gates)
        if result.gate is not None:
            gates = {**gates, (request.target.name, rung.name): result.gate}
        candidate = result.candidate
        passed_over = passed_over or result.verdict != "no_replica"
        if candidate is None:
            continue
        if result.verdict == "answers":
            at_home = place == home_place(request.placement, request.rungs, now)
            if at_home or _is_worth_it(candidate, spilled, too_slow, request):
                return Decision(candidate, gates)
        elif result.verdict == "too_slow":
            too_slow.append(candidate)
        else:
            spilled = spilled or candidate
    if spilled is not None:
        return Decision(spilled, gates)
    return Decision(min(too_slow, key=lambda each: cost(each.replica, request), default=None), gates)


def _abandoned(gate: SpillGate, request: RoutingRequest, place: int, now: float) -> RungResult:
    """A rung that no request can use now: a conversation that lived there returns once it has been free for a while."""
    after = abandoned(gate, now, home_of(request.placement, request.rungs, place, now))
    return NO_REPLICA if after is gate else RungResult(None, "no_replica", after)


def _is_worth_it(
    candidate: Candidate, spilled: Candidate | None, too_slow: Iterable[Candidate], request: RoutingRequest
) -> bool:
    """Return whether a lower rung saves the time that the request would lose on those above."""
    replica = candidate.replica
    if not replica.known:
        return True
    if spilled is not None and replica.wait_seconds >= spilled.replica.wait_seconds:
        return False
    return all(cost(replica, request) < cost(above.replica, request) for above in too_slow)


def _waits_for_its_cache(
    best: LatencyEstimate | None, able: Sequence[LatencyEstimate], request: RoutingRequest, spill: Spill
) -> bool:
    """Return whether a rung is slow for this request alone: it waits where its prompt is cached, others need not."""
    if (
        best is None
        or (not request.cached_tokens and request.session_hash is None)
        or best.wait_seconds <= spill.after_seconds
    ):
        return False
    uncached = msgspec.structs.replace(request, placement=None, session_hash=None, cached_tokens=NOTHING_CACHED)
    other = pick(able, uncached, spill)
    return other is not None and other.wait_seconds <= spill.after_seconds


def _best(roomy: Sequence[LatencyEstimate], request: RoutingRequest) -> LatencyEstimate:
    """Pick by cost, or by the queue where a speed is unknown: seconds and requests cannot be compared."""
    for each in roomy:
        if not each.known:
            return shortest_queue(roomy, request.turn)
    return _cheapest(roomy, request)


def _cheapest(roomy: Sequence[LatencyEstimate], request: RoutingRequest) -> LatencyEstimate:
    """Pick the lowest cost; equals take turns, and a conversation stays, or goes home, where that costs hardly more."""
    scores = costs(roomy, request)
    count = len(roomy)
    first = request.turn % count
    lowest = min(scores)
    placement = request.placement
    if placement is not None and not placement.running:
        for each, seconds in zip(roomy, scores, strict=True):
            if each.id == placement.replica_id and seconds <= STICKY_SHARE * lowest + STICKY_SECONDS:
                return each
    if request.session_hash is not None and (placement is None or not placement.running):
        limit = HOME_SHARE * lowest + STICKY_SECONDS
        near = [each for each, seconds in zip(roomy, scores, strict=True) if seconds <= limit]
        return near[highest_weight(request.session_hash, [each.hash for each in near])]
    place = scores.index(lowest, first) if lowest in scores[first:] else scores.index(lowest)
    return roomy[place]


def _reason(place: int, request: RoutingRequest, passed_over: bool) -> Reason:
    target = request.target
    if target.pinned:
        return "pinned"
    if not place:
        rung = request.rungs[0]
        if rung.name == target.canary:
            return "canary"
        # `floor`: the caller, the key or the alias ruled a better rung out.
        return "preferred" if rung.name == target.rungs[0].name else "floor"
    return "spill" if passed_over else "fallback"
