"""The cost of a decision by the number of candidates: all that the dispatcher does for one request."""

import asyncio
import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from config.schema import AliasSettings
from config.variant import QualityMeasures, Variant
from gateway.cli.serve import settle
from gateway.observability.metrics import Metrics
from gateway.proxy.dispatcher import Dispatcher
from gateway.proxy.load.tracker import LoadTracker
from gateway.routing.engine_metrics import EngineMetrics
from gateway.routing.request import RoutingRequest
from gateway.routing.speed import SpeedProfile
from gateway.routing.target import Catalog, Target
from serving.registry import Registry
from serving.replica import Replica, State
from tests.gateway.proxy.dispatching import lease_or_wait

CANDIDATES = (1, 8, 64, 1000)
ALIASES, OF_AN_ALIAS = 100, 10
ROUNDS, LEAST_DECISIONS, MOST_CANDIDATES = 7, 40, 40_000
IN_FLIGHT = 3  # at each replica, throughout
BLOCKS = tuple(range(16))  # 4 KiB of prompt
PROMPTS = ("plain", "session", "blocks one holds", "blocks all hold", "session and blocks all hold")
SPEED = SpeedProfile(tuple([0.02] * 64), tuple([50.0 * at_once for at_once in range(1, 65)]), 1e-4, 60)


@dataclass(frozen=True, slots=True)
class Cost:
    """Microseconds of a lease and its release, the least of several rounds, by PROMPTS."""

    fleet: str
    prompts: tuple[float, ...]


def decision_costs() -> list[Cost]:
    """Measure fleets of one alias, and one of many aliases."""
    before = gc.get_threshold()
    try:
        return _measured()
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


def _measured() -> list[Cost]:
    costs = [Cost(f"{count} candidates", _costs(1, count)) for count in CANDIDATES]
    return [*costs, Cost(f"{OF_AN_ALIAS} candidates, {ALIASES} aliases", _costs(ALIASES, OF_AN_ALIAS))]


def _costs(aliases: int, candidates: int) -> tuple[float, ...]:
    return tuple([asyncio.run(_cost(aliases, candidates, prompt)) for prompt in PROMPTS])


async def _cost(aliases: int, candidates: int, prompt: str) -> float:
    with _dispatcher(aliases, candidates) as (dispatcher, targets):
        if "all" in prompt:
            await _warm(dispatcher, targets, candidates)
        for target in targets:
            for _ in range(IN_FLIGHT * candidates):
                lease = await lease_or_wait(dispatcher, _request(dispatcher, target, 200.0), 30.0)
                lease.in_flight.first_token()
        settle()
        times = max(LEAST_DECISIONS, min(1000, MOST_CANDIDATES // candidates))
        return min([await _round(dispatcher, targets, prompt, times) for _ in range(ROUNDS)])


async def _round(dispatcher: Dispatcher, targets: Sequence[Target], prompt: str, times: int) -> float:
    blocks = BLOCKS if "blocks" in prompt else ()
    sessions = [f"s{each % 20}" if "session" in prompt else None for each in range(times)]
    requests = [
        _request(dispatcher, targets[each % len(targets)], 900.0, blocks, session)
        for each, session in enumerate(sessions)
    ]
    started_at = time.perf_counter()
    for request in requests:
        lease = await lease_or_wait(dispatcher, request, 30.0)
        with lease:
            lease.in_flight.first_token()
            lease.succeeded()
            lease.answer_tokens = 100
    return (time.perf_counter() - started_at) / times * 1e6


async def _warm(dispatcher: Dispatcher, targets: Sequence[Target], candidates: int) -> None:
    """Send the blocks to every replica."""
    for target in targets:
        tried = frozenset[str]()
        for _ in range(candidates):
            request = _request(dispatcher, target, 900.0, BLOCKS)
            with await lease_or_wait(dispatcher, request, 30.0, tried=tried) as lease:
                tried |= {lease.replica.id}


def _request(
    dispatcher: Dispatcher,
    target: Target,
    prompt_tokens: float,
    blocks: tuple[int, ...] = (),
    session: str | None = None,
) -> RoutingRequest:
    turn = dispatcher.next_turn()
    return RoutingRequest(
        target,
        target.permitted,
        turn,
        request_id=f"r{turn}",
        streams=True,
        prompt_tokens=prompt_tokens,
        prompt_bytes=3600,
        blocks=blocks,
        session=session,
    )


@contextmanager
def _dispatcher(aliases: int, candidates: int) -> Iterator[tuple[Dispatcher, list[Target]]]:
    """A dispatcher whose replicas have all been polled."""
    registry = Registry()
    variants = {
        f"v{each}": Variant(f"v{each}", "bf16", QualityMeasures("measured", 0.0, 1.0, 1.0)) for each in range(aliases)
    }
    catalog = Catalog({f"a{each}": AliasSettings(ladder=(f"v{each}",)) for each in range(aliases)}, variants)
    loads = LoadTracker(registry.in_flight, dict.fromkeys(variants, SPEED))
    replicas = [
        Replica(f"{variant}-{each}", variant, "bf16", "http://nowhere", "m")
        for variant in variants
        for each in range(candidates)
    ]
    for replica in replicas:
        registry.put(replica, State.READY)
    with Dispatcher(registry, loads, Metrics()) as dispatcher:
        for replica in replicas:
            now = time.monotonic()
            dispatcher.polled(replica.id, now, EngineMetrics(now, 0.0, 0.0, 0.1, 200_000, 0.0, 0.0))
        yield dispatcher, [catalog.resolve(name) for name in catalog.aliases]
