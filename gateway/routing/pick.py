"""The decision: the highest rung of a ladder that answers soon enough, and there the replica that answers soonest.

From the best rung down: a rung whose cheapest replica keeps the caller waiting for no longer than `spill.after_seconds`
answers, unless its gate is open and it is this request's turn to go down, so that the rung recovers. If no rung is soon
enough, the fastest of all answers. Rungs below the floor are not among those that this is told of.
"""

from collections.abc import Iterable, Mapping, Sequence
from math import inf
from typing import Literal

import msgspec

from config.schema import Spill
from config.variant import Variant
from gateway.routing.breaker import admissible
from gateway.routing.catalog import Target
from gateway.routing.cluster_state import ClusterState, GateName, Query, admitted, with_room
from gateway.routing.latency import LatencyEstimate
from gateway.routing.request import needed_tokens
from gateway.routing.score import able_to, best_of, cost_of, shortest
from gateway.routing.sessions import Placement
from gateway.routing.spill import CLOSED, Manner, SpillGate, Verdict, evaluate, evaluate_last, update
from serving.replica import HOPEFUL, Replica, ReplicaStatus

Reason = Literal["preferred", "spill", "floor", "pinned", "canary", "fallback"]

# More turns at once have no conversation, but many of them that a client gave one name: `user`, mostly.
MOST_TURNS = 4
# Nobody is refused for less: waits aren't known better, and a request that may not queue at all has this replica.
SHORTEST_WAIT_SECONDS = 1.0


class Choice(msgspec.Struct, frozen=True, gc=False):
    """One replica that may answer, and why it is its turn."""

    replica: Replica
    variant: Variant
    reason: Reason


class Candidate(msgspec.Struct, frozen=True, gc=False):
    """The cheapest replica of a rung."""

    choice: Choice
    outlook: LatencyEstimate

    def is_sooner_than(self, other: "Candidate") -> bool:
        """Tell whether a request waits for less long here."""
        return self.outlook.wait_seconds < other.outlook.wait_seconds

    def comes_too_late(self, patience_seconds: float) -> bool:
        """Tell whether it isn't worth waiting for; where nobody measured, that would be a guess."""
        return self.outlook.measured and self.outlook.work_seconds > max(patience_seconds, SHORTEST_WAIT_SECONDS)


class RungResult(msgspec.Struct, frozen=True, gc=False):
    """What comes of one rung: its cheapest replica, whether that one answers, and its gate if that changed.

    `wait_seconds` is how soon any of its replicas would be ready for this request.
    """

    offer: Candidate | None
    verdict: Verdict | Literal["nobody"]
    gate: SpillGate | None = None
    wait_seconds: float = inf


NOBODY_THERE = RungResult(None, "nobody")


class Decision(msgspec.Struct, frozen=True, gc=False):
    """Who answers, None if nobody has room; and the gates that turned, or owe another share than before."""

    offer: Candidate | None
    gates: Mapping[GateName, SpillGate]


def decide(target: Target, rungs: tuple[Variant, ...], query: Query, scene: ClusterState, now: float) -> Decision:
    """Choose a replica among those of the rungs that may answer.

    Replicas that their breakers bar come last, below every rung: only when all others have failed, or are full.
    """
    needed = needed_tokens(query.ask)
    decision = _descent(target, rungs, query, scene, needed, now)
    if decision.offer is None and needed and not anybody_fits(rungs, scene, needed):
        # Its engine says it better than we could.
        needed = 0.0
        decision = _descent(target, rungs, query, scene, needed, now)
    if decision.offer is None and scene.breakers:
        offer = _last_resort(target, rungs, query, scene, needed, now)
        return Decision(offer, decision.gates)
    return decision


def _descent(
    target: Target, rungs: tuple[Variant, ...], query: Query, scene: ClusterState, needed: float, now: float
) -> Decision:
    """Go down the ladder until a rung is soon enough."""
    home = home_of(query.stay, rungs)
    gates: dict[GateName, SpillGate] = {}
    held_back: Candidate | None = None
    too_slow: list[Candidate] = []
    passed_over = False
    for place, rung in enumerate(rungs):
        step = step_at(place, target, rungs, query, scene, needed, now, passed_over=passed_over)
        if step.gate is not None:
            gates[target.name, rung.name] = step.gate
        passed_over = passed_over or step.verdict != "nobody"
        offer = step.offer
        if offer is None:
            continue
        if step.verdict == "answers":
            if _is_worth_it(offer, held_back, too_slow, query) or (place == home and not too_slow):
                return Decision(offer, gates)
        elif step.verdict == "goes":
            held_back = held_back or offer
        else:
            too_slow.append(offer)
    return Decision(held_back or min(too_slow, key=lambda offer: cost_of(offer.outlook, query), default=None), gates)


def _is_worth_it(offer: Candidate, held_back: Candidate | None, too_slow: Iterable[Candidate], query: Query) -> bool:
    """Tell whether a lower rung spares the request time that it would lose on those above."""
    if not offer.outlook.known:
        return True
    if held_back is not None and not offer.is_sooner_than(held_back):
        return False
    return all(cost_of(offer.outlook, query) < cost_of(above.outlook, query) for above in too_slow)


def step_at(
    place: int,
    target: Target,
    rungs: tuple[Variant, ...],
    query: Query,
    scene: ClusterState,
    needed: float,
    now: float,
    *,
    passed_over: bool,
) -> RungResult:
    """Look at one rung; `passed_over`: a better one has a replica that could have answered."""
    rung, spill = rungs[place], target.spill
    outlooks = admitted(scene.outlooks(rung.name), scene, now)
    able = able_to(outlooks, query, needed)
    if not able:
        return NOBODY_THERE
    offer = _offer(target, rungs, rung, best_of(able, query, spill), passed_over=passed_over)
    before = scene.gates.get((target.name, rung.name), CLOSED)
    if offer is not None and not offer.outlook.known:
        gate = update(before, spill, 0.0, now)
        return RungResult(offer, "answers", None if gate is before else gate, 0.0)
    wait_seconds = inf if offer is None else offer.outlook.wait_seconds
    if len(able) < len(outlooks) or rung is rungs[-1] or _is_personal(offer, able, query, spill):
        # What is so for one request alone is no reason to send others down.
        return RungResult(offer, evaluate_last(spill, wait_seconds), None, wait_seconds)
    gate, verdict = evaluate(before, spill, wait_seconds, now, _manner(home_of(query.stay, rungs), place))
    return RungResult(offer, verdict, None if gate is before else gate, wait_seconds)


def _is_personal(offer: Candidate | None, able: Sequence[LatencyEstimate], query: Query, spill: Spill) -> bool:
    """Tell whether a rung is slow for this request alone: it waits where its prompt is cached, and others needn't."""
    if offer is None or not query.cached_tokens or offer.outlook.wait_seconds <= spill.after_seconds:
        return False
    others = best_of(able, Query(query.ask, query.turn), spill)
    return others is not None and others.wait_seconds <= spill.after_seconds


def home_of(stay: Placement | None, rungs: tuple[Variant, ...]) -> int | None:
    """The rung on which a conversation was answered last, if it may answer still; a crowd is at home nowhere."""
    if stay is None or stay.running > MOST_TURNS:
        return None
    for place, rung in enumerate(rungs):
        if rung.name == stay.variant:
            return place
    return None


def _manner(home: int | None, place: int) -> Manner:
    if home is None or home < place:
        return "new"
    return "at home" if home == place else "lives below"


def _offer(
    target: Target, rungs: tuple[Variant, ...], rung: Variant, outlook: LatencyEstimate | None, *, passed_over: bool
) -> Candidate | None:
    if outlook is None:
        return None
    return Candidate(Choice(outlook.replica, rung, _reason(target, rung, rungs, passed_over=passed_over)), outlook)


def anybody_fits(rungs: tuple[Variant, ...], scene: ClusterState, needed: float) -> bool:
    """Tell whether any replica's context is long enough."""
    return any(needed <= each.context_tokens for rung in rungs for each in scene.outlooks(rung.name))


def long_enough(rungs: tuple[Variant, ...], scene: ClusterState, needed: float) -> float:
    """The shortest context that is there and that a request fits in; 0 if it fits in all of them, or in none."""
    there = {each.context_tokens for rung in rungs for each in scene.outlooks(rung.name)}
    fitting = [tokens for tokens in there if tokens >= needed]
    return min(fitting) if 0 < len(fitting) < len(there) else 0.0


def _last_resort(
    target: Target, rungs: tuple[Variant, ...], query: Query, scene: ClusterState, needed: float, now: float
) -> Candidate | None:
    """The least bad of those that breakers bar, on the highest rung that has one."""
    for rung in rungs:
        outlooks = scene.outlooks(rung.name)
        barred = admissible([each.id for each in outlooks], scene.breakers, now).last_resort
        allowed = able_to(with_room([each for each in outlooks if each.id in barred], scene, now), query, needed)
        offer = _offer(target, rungs, rung, shortest(allowed, query.turn), passed_over=False)
        if offer is not None:
            return offer
    return None


def worth_waiting(rungs: tuple[Variant, ...], snapshot: Iterable[ReplicaStatus]) -> bool:
    """Tell whether a replica that may answer is on its way."""
    names = {variant.name for variant in rungs}
    return any(status.state in HOPEFUL and status.replica.variant in names for status in snapshot)


def has_room(target: Target, rungs: tuple[Variant, ...], scene: ClusterState, now: float, needed: float = 0.0) -> bool:
    """Tell whether any replica that may answer, with a context that is long enough, takes one more request."""
    query = Query()
    if needed and not anybody_fits(rungs, scene, needed):
        needed = 0.0
    if any(
        each.has_room and needed <= each.context_tokens
        for rung in rungs
        for each in admitted(scene.outlooks(rung.name), scene, now)
    ):
        return True
    return bool(scene.breakers) and _last_resort(target, rungs, query, scene, needed, now) is not None


def _reason(target: Target, variant: Variant, rungs: tuple[Variant, ...], *, passed_over: bool) -> Reason:
    if target.pinned:
        return "pinned"
    if variant is rungs[0]:
        # The best that the caller lets answer; `floor` if the caller or the alias ruled a better rung out.
        return "preferred" if rungs[0] is target.rungs[0] else "floor"
    return "spill" if passed_over else "fallback"
