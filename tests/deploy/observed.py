"""A gateway with traffic, replicas and a rollout, and the Prometheus that scrapes it."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import Any

import httpx

from config.manifest import Manifest
from config.schema import ReplicaSettings, Settings
from config.variant import QualityMeasures, Variant, read_variants
from gateway.deployment import Deployment
from gateway.keys import Keys, StoredKey, keys_in_force
from gateway.rollout.machine import Phase
from gateway.rollout.operating import Operator, Replacement
from gateway.rollout.plan import PlanSettings
from gateway.routing.speed import SpeedProfile
from serving.registry import Registry
from serving.replica import Replica, State
from serving.state.database import StateDatabase
from serving.state.rollouts import RolloutDatabase
from serving.tls import read_tls
from tests.config.sealed import manifest_of
from tests.deploy.prometheus import Prometheus, running_prometheus
from tests.fakes.certificates import Authority
from tests.fakes.running import ROOT, FakeReplica, eventually, running_fake
from tests.gateway.fleet import CHAT, Fleet, running_gateway
from tests.serving.kubernetes.pods import SERVICE, addresses, discovering

# Of each replica: requests that routing takes for its capacity, and tokens per second of one answer. A fake takes more
# without being slower; its KV cache is full at `--max-num-seqs`, which would be a long wait.
SLOTS, TOKENS_PER_SECOND, ANSWER_TOKENS = 4, 40.0, 12
FLAGS = (
    *("--max-num-seqs", str(4 * SLOTS), "--fake-tokens", str(ANSWER_TOKENS), "--fake-reasoning-tokens", "4"),
    *("--fake-tokens-per-second", str(TOKENS_PER_SECOND)),
)
SPEED = SpeedProfile(
    step_seconds=(1 / TOKENS_PER_SECOND,) * SLOTS,
    together=tuple(TOKENS_PER_SECOND * at_once for at_once in range(1, SLOTS + 1)),
    reading_seconds=1e-5,
    slots=SLOTS,
    answer_tokens=float(ANSWER_TOKENS),
)
# By variant: bits, size in GB, top-1 agreement and its bound, KL divergence, length ratio.
MEASURED = {
    "int8": (8, 34, 0.985, 0.981, 0.004, 1.00),
    "int8-v2": (8, 34, 0.986, 0.982, 0.004, 1.01),
    "int4": (4, 19, 0.947, 0.941, 0.031, 1.03),
}
EXTERNAL = {
    "external": "openai/gpt-4.1",
    "api_key": "k",
    "base_url": "http://127.0.0.1:9",
    "budget": {"usd_per_day": 20},
}
KEYS = {"web": "qg-web", "batch": "qg-batch"}
SPILL = {"after_seconds": 0.4, "return_below_seconds": 0.1, "dwell_seconds": 3}


@dataclass(frozen=True, slots=True)
class Observed:
    """What runs: a gateway, its Prometheus, and clients that can be added."""

    fleet: Fleet
    prometheus: Prometheus
    clients: "Clients"
    operator: Operator

    async def start_rollout(self, steps: tuple[float, ...] = (50.0, 100.0), step_seconds: float = 600) -> None:
        """Replace a variant of `assistant`; returns once conversations are drawn to the new one."""
        settings = PlanSettings(steps=steps, step_seconds=step_seconds, compare=False)
        self.operator.start(self.operator.plan(Replacement("assistant", "int8-v2", "int8"), settings), "a test")
        await eventually(lambda: self.operator.latest("assistant").phase == Phase.CANARY)


class Clients:
    """Clients that ask one new conversation after the other."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client
        self._numbers = count()

    @contextmanager
    def asking(self, model: str, clients: int, key: str = "web") -> Iterator[None]:
        """Let so many clients ask while the block runs; two of three requests are streams."""
        tasks = [asyncio.create_task(self._ask_on(model, key)) for _ in range(clients)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()

    async def ask(self, model: str, key: str = "web", **body: Any) -> int:
        """Ask once, and return the status."""
        messages = [{"role": "user", "content": f"question {next(self._numbers)}"}]
        headers = {"authorization": f"Bearer {KEYS.get(key, key)}"}
        response = await self._client.post(CHAT, json={"model": model, "messages": messages, **body}, headers=headers)
        return response.status_code

    async def _ask_on(self, model: str, key: str) -> None:
        for number in count():
            await self.ask(model, key, stream=number % 3 != 0)


@asynccontextmanager
async def observed(executable: str, folder: Path, scrape_seconds: int = 1) -> AsyncIterator[Observed]:
    """Run everything, without clients."""
    async with AsyncExitStack() as stack:
        fakes = await _replicas(stack)
        deployment = deployed(folder, fakes)
        operator = Operator(deployment, RolloutDatabase(StateDatabase.at(deployment.state or "")), "anna")
        stack.callback(operator.close)
        operator.database.revision()
        # A pod that is listed and never ready: it takes no requests from the replicas.
        registry = Registry()
        scene = await stack.enter_async_context(discovering(registry=registry))
        await scene.cluster.add_workload(SERVICE, 0, addresses((fakes["int8"],)), start_seconds=3600)
        await scene.cluster.scale(SERVICE, 1)
        fleet = await stack.enter_async_context(running_gateway(deployment, registry, scene.discovery))
        _register(fleet, fakes, folder)
        clients = Clients(fleet.client)
        engines = [fake.url.removeprefix("http://") for fake in fakes.values()]
        targets = {"quantgate": [fleet.served.addresses.admin], "vllm": engines}
        prometheus = await stack.enter_async_context(running_prometheus(executable, targets, scrape_seconds))
        yield Observed(fleet, prometheus, clients, operator)


def deployed(folder: Path, fakes: dict[str, FakeReplica]) -> Deployment:
    """An alias with three rungs, one whose int8 variant is being replaced, and one whose floor nothing meets."""
    settings = Settings.model_validate(
        {
            "gateway": {"listen": "127.0.0.1:0", "admin": "127.0.0.1:0", "per_key_metrics": True, "access_log": "off"},
            "variants": {
                "bf16": {"precision": "bf16"},
                "gpt": EXTERNAL,
                **{name: {"precision": f"int{bits}"} for name, bits in _BITS},
            },
            "replicas": [{"variant": name, "url": fake.url} for name, fake in fakes.items()],
            "aliases": {
                "anything": {"ladder": ["bf16", "gpt"]},
                "qwq-32b": {"ladder": ["bf16", "int8", "int4"], "spill": SPILL},
                "assistant": {"ladder": ["int8", "int4"], "spill": SPILL},
                "exact": {"ladder": ["int4"], "floor": {"top1_agreement": 0.99}},
            },
        }
    )
    variants = {name: _measured(variant) for name, variant in read_variants(settings.variants, ROOT).items()}
    speeds = dict.fromkeys(variants, SPEED)
    return Deployment(settings, variants, _keys(), f"sqlite:///{folder}/state.db", speeds=speeds)


_BITS = [(name, measured[0]) for name, measured in MEASURED.items()]


def _measured(variant: Variant) -> Variant:
    if variant.name not in MEASURED:
        return replace(variant, quality=QualityMeasures("parent", 0.0, 1.0, 1.0, 0.0, 1.0))
    bits, gigabytes, top1, bound, kl, length = MEASURED[variant.name]
    files = {"model.safetensors": {"sha256": "0", "bytes": gigabytes * 10**9}}
    manifest = Manifest.model_validate({**manifest_of(bits), "id": f"qwq-{variant.name}", "files": files})
    quality = QualityMeasures("measured", kl, top1, 1 + kl, 10 * kl, length, bounds={"top1_agreement": bound})
    return replace(variant, quality=quality, manifest=manifest)


def _keys() -> Keys:
    return keys_in_force({name: StoredKey(sha256=(sha256(key.encode()).hexdigest(),)) for name, key in KEYS.items()})


async def _replicas(stack: AsyncExitStack) -> dict[str, FakeReplica]:
    """One engine per variant; that of int4 fails its first two requests, which are retried."""
    starts = {
        variant: running_fake(*FLAGS, *(("--fake-fail-first", "2") if variant == "int4" else ()), served=variant)
        for variant in ("bf16", *MEASURED)
    }
    fakes = await asyncio.gather(*map(stack.enter_async_context, starts.values()))
    return dict(zip(starts, fakes, strict=True))


def _register(fleet: Fleet, fakes: dict[str, FakeReplica], folder: Path) -> None:
    for variant, fake in fakes.items():
        precision = variant.partition("-")[0]
        fleet.registry.put(Replica(f"{variant}-1", variant, precision, fake.url, variant), State.READY)
    authority = Authority(folder, "ca")
    issued = authority.issue()
    options = {"ca": "ca.pem", "certificate": issued.certificate.name, "key_file": issued.key.name}
    settings = ReplicaSettings.model_validate({"variant": "int4", "url": "https://127.0.0.1:9", **options})
    down = Replica("int4-2", "int4", "int4", "https://127.0.0.1:9", "int4", tls=read_tls((settings,), folder)[0])
    fleet.registry.put(down, State.FAILED)
