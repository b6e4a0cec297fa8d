"""Score: what a request costs on each replica, in seconds until it is answered."""

from collections.abc import Sequence

import msgspec

from gateway.routing.latency import LatencyEstimate
from gateway.routing.request import RoutingRequest


class CostTerms(msgspec.Struct, frozen=True):
    """The cost of a request on one replica by its terms, in seconds; `cached` is subtracted from the others."""

    queue: float
    ahead: float
    kv: float
    reading: float
    cached: float
    answering: float
    total: float


def costs(replicas: Sequence[LatencyEstimate], request: RoutingRequest) -> list[float]:
    """Score replicas whose speeds are known."""
    prompt_tokens, cached = request.prompt_tokens, request.cached_tokens
    answer_tokens = expected_answer_tokens(replicas[0], request)
    if not cached:
        return [
            each.fixed_seconds + prompt_tokens * each.token_seconds + answer_tokens * each.answer_seconds
            for each in replicas
        ]
    return [
        each.fixed_seconds
        + max(prompt_tokens - cached.get(each.id, 0.0), 0.0) * each.token_seconds
        + answer_tokens * each.answer_seconds
        for each in replicas
    ]


def cost(replica: LatencyEstimate, request: RoutingRequest) -> float:
    """Score one replica whose speed is known."""
    return costs((replica,), request)[0]


def expected_answer_tokens(replica: LatencyEstimate, request: RoutingRequest) -> float:
    """The usual length of its variant's answers, or less if the client limits it."""
    usual = replica.answer_tokens
    return usual if request.answer_tokens is None else min(usual, request.answer_tokens)


def cost_terms(replica: LatencyEstimate, request: RoutingRequest) -> CostTerms:
    """Split the cost on a replica into its terms."""
    cached_tokens = min(request.cached_tokens.get(replica.id, 0.0), request.prompt_tokens)
    own_seconds = replica.fixed_seconds - replica.wait_seconds
    return CostTerms(
        queue=replica.queue_seconds,
        ahead=replica.ahead_seconds,
        kv=replica.kv_seconds,
        reading=own_seconds + request.prompt_tokens * replica.token_seconds,
        cached=cached_tokens * replica.token_seconds,
        answering=expected_answer_tokens(replica, request) * replica.answer_seconds,
        total=cost(replica, request),
    )
