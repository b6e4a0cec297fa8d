"""Rungs, requests, estimates and cluster states for tests of decisions, and hypothesis strategies for all of them."""

from typing import Any

import msgspec
from hypothesis import strategies as st

from config.schema import NO_FLOOR, Spill
from config.variant import QualityMeasures, Variant
from gateway.routing.breaker import HEALTHY, Breaker, failed
from gateway.routing.cluster_state import ClusterState
from gateway.routing.filters import Rejection
from gateway.routing.latency import LatencyEstimate
from gateway.routing.overload import Overload
from gateway.routing.pick import Decision, decide
from gateway.routing.request import RoutingRequest
from gateway.routing.sessions import Placement
from gateway.routing.spill import SpillGate
from gateway.routing.target import Target

HI = Variant("hi", "bf16", QualityMeasures("parent", 0.0, 1.0, 1.0))
MID = Variant("mid", "int8", QualityMeasures("measured", 0.01, 0.97, 1.01))
LO = Variant("lo", "int4", QualityMeasures("measured", 0.05, 0.92, 1.05))
BAD = Variant("bad", "int4", QualityMeasures("measured", 0.3, 0.7, 1.3))
EXCLUDED = Rejection(BAD, "its verdict is fail")
RUNGS = (HI, MID, LO)
SPILL = Spill(after_seconds=2.0, return_below_seconds=0.5, dwell_seconds=10)
TARGET = Target("smol", RUNGS, NO_FLOOR, pinned=False, spill=SPILL)
SPILLING = {("smol", "hi"): SpillGate(spilling=True)}
NOW = 100.0


def request(
    *, target: Target = TARGET, rungs: tuple[Variant, ...] = RUNGS, prompt_tokens: float = 0.0, **fields: Any
) -> RoutingRequest:
    """A request for an alias with three rungs."""
    return RoutingRequest(target, rungs, prompt_tokens=prompt_tokens, **fields)


LONG = request(prompt_tokens=100)


def estimate(name: str, wait: float | None = 0.0, *, requests: float = 0.0, **changes: Any) -> LatencyEstimate:
    """The estimate of a replica, named by variant and number; a wait of None means that its speed is unknown."""
    known, wait = wait is not None, wait or 0.0
    variant = name.partition("-")[0]
    plain = LatencyEstimate(
        name, variant, True, known, known, False, int(requests), requests, queue_seconds=wait, wait_seconds=wait
    )
    costs = {"fixed_seconds": wait, "token_seconds": 0.001, "answer_seconds": 0.02}
    return msgspec.structs.replace(plain, **{**costs, **changes})


def cluster(*estimates: LatencyEstimate, **state: Any) -> ClusterState:
    """A cluster with these replicas; `state` are breakers, overloads and gates."""
    by_variant: dict[str, list[LatencyEstimate]] = {}
    for each in estimates:
        by_variant.setdefault(each.variant, []).append(each)
    return ClusterState(lambda variant: by_variant.get(variant, ()), **state)


def decision(*estimates: LatencyEstimate, request: RoutingRequest = LONG, now: float = NOW, **state: Any) -> Decision:
    """Decide on a request in such a cluster."""
    return decide(request, cluster(*estimates, **state), now)


def chosen(*estimates: LatencyEstimate, **given: Any) -> str | None:
    """The replica and the reason of a decision, such as `hi-1 preferred`."""
    return named(decision(*estimates, **given))


def named(decision: Decision) -> str | None:
    """The replica and the reason of a decision."""
    candidate = decision.candidate
    return None if candidate is None else f"{candidate.replica.id} {candidate.reason}"


def opened() -> Breaker:
    """A breaker that opened at 0, for a second."""
    breaker = HEALTHY
    for _ in range(3):
        breaker = failed(breaker, 0.0)
    return breaker


# Strategies

names = st.builds("{}-{}".format, st.sampled_from(["hi", "mid", "lo", "odd"]), st.integers(0, 3))
any_estimate = st.builds(
    estimate,
    names,
    st.none() | st.floats(0, 10),
    requests=st.integers(0, 9),
    has_room=st.booleans(),
    context_tokens=st.sampled_from([50.0, 1e6]),
    tools=st.booleans(),
)
fleets = st.lists(any_estimate, max_size=8, unique_by=lambda each: each.id)
placements = st.none() | st.builds(
    Placement, st.sampled_from(["hi", "mid", "lo", "odd"]), names, st.integers(0, 1), st.none() | st.floats(-500, 0)
)
requests = st.builds(
    request,
    prompt_tokens=st.floats(0, 1e4),
    answer_tokens=st.none() | st.integers(1, 100),
    turn=st.integers(0, 9),
    tried=st.frozensets(names, max_size=3),
    placement=placements,
    cached_tokens=st.dictionaries(names, st.floats(0, 1e4), max_size=3),
    tools=st.booleans(),
)
gates = st.dictionaries(
    st.sampled_from([("smol", "hi"), ("smol", "mid")]),
    st.builds(SpillGate, st.booleans(), st.floats(0, 100), st.floats(0, 1))
    | st.builds(SpillGate, st.just(True), st.just(0.0), st.floats(0, 1), st.floats(0, 100)),
)
breakers = st.dictionaries(names, st.builds(opened), max_size=4)
overloads = st.dictionaries(names, st.builds(Overload, until=st.sampled_from([0.0, 200.0])), max_size=3)
states = st.fixed_dictionaries({"gates": gates, "breakers": breakers, "overloads": overloads})
ladders = st.sets(st.sampled_from(range(3)), min_size=1).map(
    lambda places: tuple(RUNGS[each] for each in sorted(places))
)
