"""What a decision costs, by the candidates: all that the gateway's dispatch does for a request, but for the request."""

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
from gateway.proxy.leases import Want
from gateway.proxy.load.tracker import LoadTracker
from gateway.routing.target import Catalog, Target
from gateway.routing.engine_metrics import EngineMetrics
from gateway.routing.request import Ask
from gateway.routing.speed import SpeedProfile
from serving.registry import Registry
from serving.replica import Replica, State

CANDIDATES = (1, 8, 64, 1000)
ALIASES, OF_AN_ALIAS = 100, 10
ROUNDS, LEAST_DECISIONS, MOST_CANDIDATES = 7, 40, 40_000
IN_FLIGHT = 3  # at each replica, all the while
BLOCKS = tuple(range(16))  # 4 KiB of prompt
PROMPTS = ("plain", "session", "blocks one holds", "blocks all hold", "session and blocks all hold")
SPEED = SpeedProfile(tuple([0.02] * 64), tuple([50.0 * at_once for at_once in range(1, 65)]), 1e-4, 60)


@dataclass(frozen=True, slots=True)
class Cost:
    """Microseconds of a decision and of its end, the least of some rounds, by PROMPTS."""

    fleet: str
    prompts: tuple[float, ...]


def decision_costs() -> list[Cost]:
    """Measure, for fleets of one alias, and for one with many aliases."""
    before = gc.get_threshold()
    try:
        return _found()
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


def _found() -> list[Cost]:
    found = [Cost(f"{count} candidates", _costs(1, count)) for count in CANDIDATES]
    return [*found, Cost(f"{OF_AN_ALIAS} candidates, {ALIASES} aliases", _costs(ALIASES, OF_AN_ALIAS))]


def _costs(aliases: int, candidates: int) -> tuple[float, ...]:
    return tuple([asyncio.run(_cost(aliases, candidates, prompt)) for prompt in PROMPTS])


async def _cost(aliases: int, candidates: int, prompt: str) -> float:
    with _dispatch(aliases, candidates) as (dispatch, targets):
        if "all" in prompt:
            await _warm(dispatch, targets, candidates)
        for target in targets:
            for _ in range(IN_FLIGHT * candidates):
                await _lease(dispatch, target, Ask(200.0))
        settle()
        times = max(LEAST_DECISIONS, min(1000, MOST_CANDIDATES // candidates))
        return min([await _round(dispatch, targets, prompt, times) for _ in range(ROUNDS)])


async def _round(dispatch: Dispatcher, targets: Sequence[Target], prompt: str, times: int) -> float:
    blocks = BLOCKS if "blocks" in prompt else ()
    asks = [Ask(900.0, None, blocks, f"s{each % 20}" if "session" in prompt else None) for each in range(times)]
    wants = [_want(dispatch, targets[each % len(targets)], ask) for each, ask in enumerate(asks)]
    began = time.perf_counter()
    for want in wants:
        lease = await dispatch.lease(want, wait_seconds=30.0)
        with lease:
            lease.began()
            lease.succeeded()
            lease.answer_tokens = 100
    return (time.perf_counter() - began) / times * 1e6


async def _warm(dispatch: Dispatcher, targets: Sequence[Target], candidates: int) -> None:
    """Have every replica read the blocks."""
    for target in targets:
        tried = frozenset[str]()
        for _ in range(candidates):
            want = _want(dispatch, target, Ask(900.0, None, BLOCKS))
            with await dispatch.lease(want, wait_seconds=30.0, tried=tried) as lease:
                tried |= {lease.choice.replica.id}


async def _lease(dispatch: Dispatcher, target: Target, ask: Ask) -> None:
    lease = await dispatch.lease(_want(dispatch, target, ask), wait_seconds=30.0)
    lease.began()


def _want(dispatch: Dispatcher, target: Target, ask: Ask) -> Want:
    number = dispatch.arrived()
    return Want(target, target.permitted, number, ask, request_id=f"r{number}", streams=True, prompt_bytes=3600)


@contextmanager
def _dispatch(aliases: int, candidates: int) -> Iterator[tuple[Dispatcher, list[Target]]]:
    """A dispatch whose replicas have all been polled."""
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
    with Dispatcher(registry, loads, Metrics()) as dispatch:
        for replica in replicas:
            now = time.monotonic()
            dispatch.polled(replica.id, now, EngineMetrics(now, 0.0, 0.0, 0.1, 200_000, 0.0, 0.0))
        yield dispatch, [catalog.resolve(name) for name in catalog.aliases]
