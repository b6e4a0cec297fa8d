"""What the page shows in its tests and pictures: a fleet under load, an hour of traffic, and a rollout half way."""

import asyncio
import math
import random
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from config.quality import Interval
from config.schema import Settings
from config.variant import PARENT_QUALITY, Variant, measured_quality
from gateway.app import Gateway
from gateway.deployment import Deployment
from gateway.keys import Keys
from gateway.rollout.collection import Collection, Outcome
from gateway.rollout.lottery import Arm, Draw
from gateway.rollout.machine import Phase
from gateway.rollout.operating import Replacement
from gateway.rollout.plan import PlanSettings
from gateway.routing.speed import SpeedProfile
from gateway.status.traffic import SAMPLE_SECONDS, Served, Totals, TrafficSample
from quantize.schemes.scheme import preset
from serving.registry import Registry
from serving.replica import Replica, State
from serving.state.rollout_records import BlockRecord
from tests.fakes.running import running_fake
from tests.gateway.fleet import Fleet, running_gateway
from tests.gateway.rollout.driving import RolloutFixture
from tests.quantize.manifests import manifest, quality

ALIAS, OLD, NEW = "qwq-32b", "qwq-int4", "qwq-int4-v2"
TABLES: dict[str, Any] = {
    "variants": {
        "qwq-bf16": {"precision": "bf16"},
        "qwq-int8": {"precision": "int8"},
        OLD: {"precision": "int4"},
        NEW: {"precision": "int4"},
        "coder-int4": {"precision": "int4", "quality": {"top1_agreement": 0.91, "kl_mean": 0.07}},
    },
    "aliases": {
        ALIAS: {"ladder": ["qwq-bf16", "qwq-int8", OLD], "floor": {"top1_agreement": 0.93}},
        "qwq-32b-strict": {"ladder": ["qwq-bf16", "qwq-int8", OLD], "floor": {"top1_agreement": 0.98}},
        "coder": {"ladder": ["coder-int4"]},
    },
}
LISTEN = {"listen": "127.0.0.1:0", "admin": "127.0.0.1:0"}


def variants() -> dict[str, Variant]:
    """A parent, and variants as they were measured."""
    return {
        "qwq-bf16": Variant("qwq-bf16", "bf16", PARENT_QUALITY),
        "qwq-int8": _measured("qwq-int8", "w8a16-g128", 35_100_000_000, 0.9897, 0.0031, 1.002),
        OLD: _measured(OLD, "w4a16-g128", 19_300_000_000, 0.9466, 0.0274, 1.014),
        NEW: _measured(NEW, "w4a16-g128", 19_300_000_000, 0.9541, 0.0221, 1.011),
        "coder-int4": Variant("coder-int4", "int4", replace(PARENT_QUALITY, source="declared", top1_agreement=0.91)),
    }


def _measured(name: str, scheme: str, size_bytes: int, top1: float, kl: float, perplexity: float) -> Variant:
    intervals = {
        "top1_agreement": Interval(low=top1 - 0.004, high=top1 + 0.004),
        "kl_mean": Interval(low=kl * 0.9, high=kl * 1.1),
        "perplexity_ratio": Interval(low=perplexity - 0.002, high=perplexity + 0.003),
    }
    figures = quality(top1_agreement=top1, kl_mean=kl, perplexity_ratio=perplexity, intervals=intervals)
    made = manifest(id=f"{name}-7f3a91c2", scheme=preset(scheme), quality=figures)
    base = made.base.model_copy(update={"name": "QwQ-32B-finetuned"})
    files = {"model.safetensors": made.files["model.safetensors"].model_copy(update={"bytes": size_bytes})}
    sealed = made.model_copy(update={"base": base, "files": files})
    return Variant(name, sealed.scheme.precision, measured_quality(figures), manifest=sealed)


def _speed(tokens_per_second: float, slots: int) -> SpeedProfile:
    rates = [tokens_per_second / (1 + 0.04 * number) for number in range(slots)]
    together = tuple(rate * (number + 1) for number, rate in enumerate(rates))
    return SpeedProfile(tuple(1 / rate for rate in rates), together, 1 / 3000, slots, 120.0, 200_000)


def deployed(state: str | None = None, keys: Keys | None = None, **gateway: Any) -> Deployment:
    """The configuration of the scenario."""
    settings = Settings.model_validate({"gateway": {**LISTEN, **gateway}, **TABLES})
    speeds = {"qwq-bf16": _speed(38.0, 4), "qwq-int8": _speed(55.0, 8), OLD: _speed(74.0, 16), NEW: _speed(76.0, 16)}
    return Deployment(settings, variants(), keys or Keys(), state, speeds=speeds)


# An hour of traffic


def an_hour(until: float) -> Iterator[TrafficSample]:
    """Samples of an hour in which a peak spills from bf16 to int8 and int4, and comes back."""
    dice, totals, monotonic = random.Random(4), dict[Served, Totals](), time.monotonic()
    for number in range(int(3600 / SAMPLE_SECONDS)):
        load = 1.2 + 2.9 * math.exp(-(((number - 590) / 110) ** 2)) + 0.25 * math.sin(number / 19)
        for variant, precision, first, most, part in (
            *(("qwq-bf16", "bf16", 0.0, 1.6, 1.0), ("qwq-int8", "int8", 1.5, 1.3, 1.0)),
            *((OLD, "int4", 2.4, 9.0, 0.7), (NEW, "int4", 2.4, 9.0, 0.3), ("coder-int4", "int4", 0.9, 0.25, 1.0)),
        ):
            requests = part * max(min(load - first, most) + dice.gauss(0, 0.07), 0.0) * SAMPLE_SECONDS
            served = (ALIAS if variant.startswith("qwq") else "coder", variant, precision)
            before = totals.get(served, Totals())
            totals[served] = Totals(
                before.requests + requests,
                before.failed + (0.02 * requests if 560 < number < 600 else 0.0),
                before.prompt_tokens + 900 * requests,
                before.answer_tokens + 130 * requests,
            )
        ago = 3600 - number * SAMPLE_SECONDS
        yield TrafficSample(until - ago, monotonic - ago, dict(totals))


def pretend(served: Gateway, samples: Iterable[TrafficSample]) -> None:
    """Let the samples be the past of a gateway, and its counters go on from the last of them."""
    history = served.traffic
    history._history.clear()
    history._recent.clear()
    for sample in samples:
        history.add(sample)
    for labels, totals in sample.totals.items():
        served.metrics.outcome(labels, "chat.completions", "200", "preferred").inc(totals.requests - totals.failed)
        served.metrics.outcome(labels, "chat.completions", "502", "preferred").inc(totals.failed)
        served.metrics.tokens.labels(*labels, "prompt").inc(totals.prompt_tokens)
        served.metrics.tokens.labels(*labels, "completion").inc(totals.answer_tokens)


# A rollout half way


async def rollout_in_canary(state: str) -> None:
    """Record a rollout whose second step has some evidence, as its driver and workers write it."""
    made = RolloutFixture(state, deployed(state), now=time.time() - 1500, alias=ALIAS)
    for variant in variants():
        made.put(variant)
    # The fake repeats itself, which one of the gates finds.
    settings = PlanSettings(steps=(5, 25, 50, 100), step_seconds=900, keep=3600, skip=("empty_or_looping",))
    made.operator.start(made.operator.plan(Replacement(ALIAS, NEW, OLD), settings), "more calibration data")
    await made.until(lambda: made.rollout.phase is Phase.CANARY)
    dice = random.Random(2)
    while made.rollout.step < 1:
        _evidence(made, dice, canary=18, stable=342)
        await made.step(60)
    while made.now < time.time() - 70:
        _evidence(made, dice, canary=40, stable=120)
        await made.step(60)
    await made.driver.__aexit__(None, None, None)
    made.database.database.close()


def _evidence(made: RolloutFixture, dice: random.Random, *, canary: int, stable: int) -> None:
    collection, step = Collection(), made.rollout.step
    arms: tuple[tuple[Arm, int], ...] = (("canary", canary), ("stable", stable))
    for arm, count in arms:
        for number in range(count):
            draw = Draw(number, arm, step, counts=True)
            collection.drawn(draw)
            values = {
                "first_token_seconds": dice.gauss(-1.2, 0.3),
                "token_seconds": dice.gauss(-4.2, 0.15),
                "answer_tokens": dice.gauss(5.0, 0.5),
                "reasoning_tokens": dice.gauss(6.0, 0.5),
            }
            collection.ended(draw, Outcome(frozenset({"errors"} if dice.random() < 0.004 else ()), values))
    document = collection.take_block()
    assert document is not None
    block = BlockRecord(made.record.id, "worker", int(made.now // 10), made.now, document.decode())
    made.database.add_evidence(made.record.id, [block], [])


# The fleet


@dataclass(slots=True)
class Scene:
    """A gateway of the scenario; `url` is that of the page."""

    fleet: Fleet
    served: Gateway

    @property
    def url(self) -> str:
        return f"http://{self.served.addresses.admin}/ui/"


@dataclass(frozen=True, slots=True)
class Engines:
    """Urls of two fakes of vLLM."""

    fast: str
    slow: str


@asynccontextmanager
async def running_engines(fast: int = 300, slow: int = 200) -> AsyncIterator[Engines]:
    """Two fakes; their speeds are in tokens per second."""
    async with (
        running_fake("--fake-tokens-per-second", str(fast), "--fake-tokens", "40") as first,
        running_fake("--fake-tokens-per-second", str(slow), "--fake-tokens", "60") as second,
    ):
        yield Engines(first.url, second.url)


@asynccontextmanager
async def scene(
    engines: Engines, state: str | None = None, keys: Keys | None = None, **gateway: Any
) -> AsyncIterator[Scene]:
    """A gateway with ready replicas at two fakes, one that starts and one that failed; an hour lies behind it."""
    registry = Registry()
    async with running_gateway(deployed(state, keys, **gateway), registry) as fleet:
        for replica_id, variant, precision, url, most in (
            ("qwq-bf16-1", "qwq-bf16", "bf16", engines.slow, 6),
            ("qwq-int8-1", "qwq-int8", "int8", engines.slow, 64),
            ("qwq-int4-1", OLD, "int4", engines.fast, 64),
            ("qwq-int4-2", OLD, "int4", engines.fast, 64),
            ("qwq-int4-v2-1", NEW, "int4", engines.fast, 64),
            ("coder-int4-1", "coder-int4", "int4", engines.fast, 64),
        ):
            registry.put(
                Replica(replica_id, variant, precision, url, "m1", max_in_flight=most, tools=True), State.READY
            )
        registry.put(
            Replica("qwq-int8-2", "qwq-int8", "int8", engines.slow, "m1"), State.STARTING, "loads weights, 61 %"
        )
        why = "exit code 1: CUDA out of memory; lower kv_cache_bytes"
        registry.put(Replica("coder-int4-2", "coder-int4", "int4", engines.fast, "m1"), State.FAILED, why)
        pretend(fleet.served, an_hour(time.time()))
        yield Scene(fleet, fleet.served)


@asynccontextmanager
async def load(fleet: Fleet, clients: int, model: str = ALIAS) -> AsyncIterator[None]:
    """Clients that ask one question after the other while the block runs."""

    async def ask(number: int) -> None:
        body: dict[str, Any] = {"model": model, "max_tokens": 60, "stream": True}
        turn = 0
        while True:
            turn += 1
            messages = [{"role": "user", "content": f"question {number}.{turn}: " + "and more " * 30}]
            await fleet.ask({**body, "messages": messages})

    async with AsyncExitStack() as stack:
        tasks = [asyncio.create_task(ask(number)) for number in range(clients)]

        async def stop() -> None:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        stack.push_async_callback(stop)
        yield


def state_in(folder: Path) -> str:
    """The URL of a state database in a folder."""
    return f"sqlite:///{folder}/state.db"
