"""The reasons of a decision, in words."""

import msgspec

from config.variant import Variant
from gateway.routing.breaker import HEALTHY, admissible
from gateway.routing.catalog import Target
from gateway.routing.cluster_state import ClusterState, Query, is_full
from gateway.routing.explanation import Terms
from gateway.routing.latency import LatencyEstimate, answer_length, seconds_for
from gateway.routing.overload import NOT_OVERLOADED
from gateway.routing.pick import Candidate, RungResult


class Looking(msgspec.Struct, frozen=True):
    """One decision, what it was made on, and what came of each rung.

    `needed` is how long a context must be; a request that would wait for longer than its patience is refused.
    """

    target: Target
    rungs: tuple[Variant, ...]
    query: Query
    scene: ClusterState
    now: float
    needed: float
    steps: tuple[RungResult, ...]
    offer: Candidate | None
    patience_seconds: float

    @property
    def is_refused(self) -> bool:
        """Whether even the chosen replica would keep the request waiting for longer than it may."""
        return self.offer is not None and self.offer.comes_too_late(self.patience_seconds)

    @property
    def soon_seconds(self) -> float:
        """How soon is soon enough."""
        return self.target.spill.after_seconds


def terms_of(outlook: LatencyEstimate, query: Query) -> Terms:
    """Split what a request costs on a replica into what it is made of."""
    ask = query.ask
    answer_tokens = answer_length(outlook, ask)
    cached_tokens = query.cached_tokens.get(outlook.id, 0.0)
    return Terms(
        queue=outlook.queue_seconds,
        ahead=outlook.ahead_seconds,
        kv=outlook.kv_seconds,
        reading=outlook.fixed_seconds - outlook.wait_seconds + ask.prompt_tokens * outlook.token_seconds,
        cached=min(cached_tokens, ask.prompt_tokens) * outlook.token_seconds,
        answering=answer_tokens * outlook.answer_seconds,
        total=seconds_for(outlook, ask, answer_tokens, cached_tokens),
    )


def because(looking: Looking) -> str:
    """Say why it is decided so."""
    offer = looking.offer
    if not looking.rungs:
        return "no variant is good enough"
    if offer is None:
        return _nobody(looking)
    outlook, soon_seconds = offer.outlook, looking.soon_seconds
    waits = f"waits for {outlook.wait_seconds:.3f} s"
    if looking.is_refused:
        return (
            f"refused (429): {outlook.id} is the soonest, {waits}, and it may wait for {looking.patience_seconds:g} s"
        )
    if is_barred(looking, outlook):
        return "the last resort: a breaker bars it, and nobody else can be asked"
    if not outlook.known:
        return "nobody knows how fast it is, so that it has the shortest queue of the best rung that can be asked"
    if outlook.wait_seconds > soon_seconds:
        return f"the soonest of all: it {waits}, and no rung answers within spill.after_seconds ({soon_seconds:g})"
    place = looking.rungs.index(offer.choice.variant)
    above = [f"{looking.rungs[each].name} {verdict(looking, each)}" for each in range(place)]
    return "; ".join([f"it {waits}, spill.after_seconds is {soon_seconds:g}", *above])


def _nobody(looking: Looking) -> str:
    if any(looking.scene.outlooks(rung.name) for rung in looking.rungs):
        return "nobody can be asked now: it waits in line for whoever has room first"
    return "no replica that may answer is ready"


def verdict(looking: Looking, place: int) -> str:
    """Say what comes of one rung."""
    step, rung, offer = looking.steps[place], looking.rungs[place], looking.offer
    if step.verdict == "nobody":
        return "has nobody to ask"
    if step.offer is None:
        return "has no room"
    if offer is not None and rung is offer.choice.variant:
        return "answers"
    if step.verdict == "goes":
        return "spills, and lets this one down"
    if step.verdict == "too slow":
        return f"is too slow: it waits for {step.offer.outlook.wait_seconds:.3f} s"
    return "could answer"


def why_not(looking: Looking, place: int, outlook: LatencyEstimate) -> str:
    """Say why it isn't this replica; nothing if it is."""
    if looking.offer is not None and outlook.id == looking.offer.outlook.id:
        return f"it waits for longer than the request may: {looking.patience_seconds:g} s" if looking.is_refused else ""
    return _unable(looking, outlook) or _outdone(looking, place, outlook)


def _unable(looking: Looking, outlook: LatencyEstimate) -> str:
    """Say what keeps a replica from being asked, whatever the others do."""
    scene, now = looking.scene, looking.now
    if outlook.id in looking.query.tried:
        return "it has failed this request already"
    if is_barred(looking, outlook):
        return f"its breaker is {scene.breakers.get(outlook.id, HEALTHY).state(now).replace('_', '-')}"
    if not outlook.has_room:
        return f"full: {outlook.in_flight} requests of at most {outlook.replica.max_in_flight}"
    if is_full(outlook, scene.marks, now):
        mark = scene.marks.get(outlook.id, NOT_OVERLOADED)
        told = (
            f"it is spared for {mark.until - now:.2f} s more" if mark.full(now) else f"it takes {mark.most:g} at once"
        )
        return f"full: it has refused a request, and {told}"
    if looking.needed > outlook.context_tokens:
        return f"its context of {outlook.context_tokens:g} tokens is too short"
    return ""


def _outdone(looking: Looking, place: int, outlook: LatencyEstimate) -> str:
    """Say what is better about whoever was chosen."""
    offer, step = looking.offer, looking.steps[place]
    assert offer is not None, "whoever can be asked is, if nobody else is"
    if offer.choice.variant is looking.rungs[place]:
        return _later(looking, offer.outlook, outlook)
    if step.verdict == "goes":
        return "its rung spills, and this request is one of those that go down"
    if step.verdict == "too slow" and step.offer is not None:
        best, others_too = step.offer.outlook, offer.outlook.wait_seconds > looking.soon_seconds
        slow = f"its rung is too slow: {best.id} waits for {best.wait_seconds:.3f} s"
        return _later(looking, offer.outlook, outlook) if others_too else slow
    if looking.rungs.index(offer.choice.variant) < place:
        return f"{offer.choice.variant.name} is a better rung, and answers"
    return "its rung spares nobody time: the one above, which lets this request down, is as soon"


def _later(looking: Looking, chosen: LatencyEstimate, other: LatencyEstimate) -> str:
    if not (chosen.known and other.known):
        return f"it has {other.requests:g} requests, {chosen.id} has {chosen.requests:g}"
    stay = looking.query.stay
    seconds = terms_of(other, looking.query).total - terms_of(chosen, looking.query).total
    if seconds < 0 and stay is not None:
        return f"{-seconds:.3f} s sooner, but the conversation stays on {chosen.id}"
    return f"{seconds:.3f} s later than {chosen.id}" if seconds > 0 else f"as soon as {chosen.id}, whose turn it is"


def is_barred(looking: Looking, outlook: LatencyEstimate) -> bool:
    """Tell whether a breaker keeps requests from a replica, but for a last resort."""
    breakers = looking.scene.breakers
    if outlook.id not in breakers:
        return False
    ids = [each.id for each in looking.scene.outlooks(outlook.replica.variant)]
    return outlook.id not in admissible(ids, breakers, looking.now).first
