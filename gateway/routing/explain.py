"""Why a request goes where it goes: the decision made once more, with what each rung and each replica had to say."""

from collections.abc import Iterable, Iterator
from math import inf

import msgspec

from config.schema import Floor
from config.variant import Variant
from gateway.routing.catalog import Target
from gateway.routing.cluster_state import ClusterState, Query
from gateway.routing.explanation import Candidate, Chosen, Explanation, Refused, RungView
from gateway.routing.latency import LatencyEstimate
from gateway.routing.pick import anybody_fits, decide, step_at
from gateway.routing.request import needed_tokens
from gateway.routing.snapshot import Absent
from gateway.routing.spill import CLOSED, share_down
from gateway.routing.why import Looking, because, terms_of, verdict, why_not


def explain(
    target: Target,
    floors: tuple[Floor, ...],
    precisions: frozenset[str] | None,
    query: Query,
    scene: ClusterState,
    now: float,
    *,
    absent: Iterable[Absent] = (),
    patience_seconds: float = inf,
) -> Explanation:
    """Make a decision, and say all there is to it."""
    result = target.filter_variants(floors, precisions)
    looking = look(target, result.kept, query, scene, now, patience_seconds)
    offer = None if looking.is_refused else looking.offer
    ladder = {rung.name for rung in (*result.kept, *(refusal.variant for refusal in result.refused))}
    return Explanation(
        model=target.name,
        chosen=None if offer is None else _chosen(offer.choice.variant, offer.outlook, offer.choice.reason),
        because=because(looking),
        prompt_tokens=query.ask.prompt_tokens,
        answer_tokens=query.ask.answer_tokens,
        spill_after_seconds=target.spill.after_seconds,
        rungs=tuple([_rung(looking, place) for place in range(len(looking.rungs))]),
        candidates=_candidates(looking),
        refused=tuple([Refused(each.variant.name, each.variant.precision, each.why) for each in result.refused]),
        absent=tuple([each for each in absent if each.variant in ladder]),
    )


def look(
    target: Target, rungs: tuple[Variant, ...], query: Query, scene: ClusterState, now: float, patience_seconds: float
) -> Looking:
    """Decide, and look at every rung on the way, also at those below whoever answers."""
    needed = needed_tokens(query.ask)
    if not anybody_fits(rungs, scene, needed):
        needed = 0.0
    steps, passed_over = [], False
    for place in range(len(rungs)):
        steps.append(step_at(place, target, rungs, query, scene, needed, now, passed_over=passed_over))
        passed_over = passed_over or steps[-1].verdict != "nobody"
    offer = decide(target, rungs, query, scene, now).offer
    return Looking(target, rungs, query, scene, now, needed, tuple(steps), offer, patience_seconds)


def _chosen(variant: Variant, outlook: LatencyEstimate, reason: str) -> Chosen:
    return Chosen(outlook.id, variant.name, variant.precision, reason)


def _rung(looking: Looking, place: int) -> RungView:
    rung, step = looking.rungs[place], looking.steps[place]
    gate = step.gate or looking.scene.gates.get((looking.target.name, rung.name), CLOSED)
    known = step.offer is not None and step.offer.outlook.known
    wait_seconds = step.wait_seconds if known else None
    return RungView(
        rung.name,
        rung.precision,
        verdict(looking, place),
        wait_seconds,
        looking.now - gate.since_seconds if gate.spilling else None,
        share_down(gate, looking.target.spill, inf if wait_seconds is None else wait_seconds),
    )


def _candidates(looking: Looking) -> tuple[Candidate, ...]:
    """Everybody ready, in the order in which they would be asked, each after those before it have failed."""
    ranks = {replica_id: rank for rank, replica_id in enumerate(_ranking(looking), start=1)}
    told = [
        _candidate(looking, place, outlook, ranks.get(outlook.id))
        for place, rung in enumerate(looking.rungs)
        for outlook in looking.scene.outlooks(rung.name)
    ]
    return tuple(sorted(told, key=lambda each: (each.rank or inf, each.terms.total if each.terms else inf)))


def _ranking(looking: Looking) -> Iterator[str]:
    query = looking.query
    while (offer := decide(looking.target, looking.rungs, query, looking.scene, looking.now).offer) is not None:
        yield offer.outlook.id
        query = msgspec.structs.replace(query, tried=query.tried | {offer.outlook.id})


def _candidate(looking: Looking, place: int, outlook: LatencyEstimate, rank: int | None) -> Candidate:
    return Candidate(
        outlook.id,
        looking.rungs[place].name,
        rank,
        outlook.requests,
        terms_of(outlook, looking.query) if outlook.known else None,
        outlook.stale,
        why_not(looking, place, outlook),
    )
