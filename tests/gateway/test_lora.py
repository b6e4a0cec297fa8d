"""LoRA adapters as rungs and as pinned models, answered by the replicas of their bases."""

import asyncio
from contextlib import AsyncExitStack
from typing import Any

import pytest

from serving.replica import Replica, State
from tests.fakes.running import eventually, running_fake
from tests.gateway.fleet import CHAT, HELLO, STREAM, Fleet, deployment, error_of, running_gateway

pytestmark = pytest.mark.asyncio(loop_scope="session")

MATH = {"math": {"quality": {"top1_agreement": 0.97}}}
TABLES: dict[str, Any] = {
    "variants": {
        "hi": {"precision": "bf16", "quality": {"top1_agreement": 1.0}, "lora": {"math": {}}},
        "lo": {"precision": "int4", "quality": {"top1_agreement": 0.95}, "lora": MATH},
    },
    "replicas": [{"variant": "lo", "url": "http://127.0.0.1:9"}],
    "aliases": {
        "math": {"ladder": ["hi-math", "lo-math"], "trust_declared": True},
        "plain": {"ladder": ["lo"]},
        "good": {"ladder": ["lo-math", "hi-math"], "floor": {"top1_agreement": 0.96}, "trust_declared": True},
    },
}
LORA = ("--enable-lora", "--lora-modules", "math=/adapters/math")


def put(fleet: Fleet, url: str, replica_id: str, *adapters: str, **options: Any) -> None:
    """Have a ready replica that serves some adapters."""
    variant = replica_id.partition("-")[0]
    replica = Replica(replica_id, variant, "any", url, "m1", adapters=adapters, tools=True, **options)
    fleet.registry.put(replica, State.READY)


@pytest.mark.parametrize("model", ["math", "lo-math"])
@pytest.mark.parametrize("body", [HELLO, STREAM])
async def test_an_adapter_answers(model: str, body: dict[str, Any]) -> None:
    """The engine is asked for the adapter by its own name; the client sees the name that it asked for."""
    async with running_fake(*LORA) as fake, running_gateway(deployment(TABLES)) as fleet:
        put(fleet, fake.url, "lo-1", "math")
        answer = await fleet.ask({**body, "model": model})
        assert answer.status_code == 200
        assert f'"model":"{model}"' in answer.text
        assert '"model":"m1"' not in answer.text
        headers = {name: answer.headers[f"x-quantgate-{name}"] for name in ("variant", "precision", "replica")}
        assert headers == {"variant": "lo-math", "precision": "int4", "replica": "lo-1"}
        (asked,) = fake.requests(CHAT)
        assert asked["body"]["model"] == "math"
        assert (await fleet.ask({**body, "model": "lo"})).headers["x-quantgate-variant"] == "lo"
        assert fake.requests(CHAT)[1]["body"]["model"] == "m1"


async def test_models_and_floors() -> None:
    """Adapters are listed like variants. An undeclared quality meets no floor, and the precision is the base's."""
    async with running_fake(*LORA) as fake, running_gateway(deployment(TABLES)) as fleet:
        put(fleet, fake.url, "lo-1", "math")
        listed = (await fleet.client.get("/v1/models")).json()["data"]
        models = {model["id"]: model["precisions"] for model in listed}
        assert models == {
            "math": ["bf16", "int4"],
            "plain": ["int4"],
            "good": ["int4"],
            "hi": ["bf16"],
            "lo": ["int4"],
            "hi-math": ["bf16"],
            "lo-math": ["int4"],
        }
        assert (await fleet.ask({**HELLO, "model": "good"})).headers["x-quantgate-variant"] == "lo-math"
        strict = await fleet.ask({**HELLO, "model": "math"}, {"x-quantgate-floor": "top1_agreement=0.98"})
        assert error_of(strict)["code"] == "quality_floor_unmet"
        assert "hi-math: top1_agreement is unknown" in error_of(strict)["message"]
        other = await fleet.ask({**HELLO, "model": "math"}, {"x-quantgate-precision": "int4"})
        assert other.headers["x-quantgate-variant"] == "lo-math"


async def test_only_replicas_that_serve_it_are_asked() -> None:
    """While replicas are replaced, some lack a new adapter; without any, a request is refused or waits for one."""
    async with AsyncExitStack() as stack:
        old = await stack.enter_async_context(running_fake())
        new = await stack.enter_async_context(running_fake(*LORA))
        fleet = await stack.enter_async_context(running_gateway(deployment(TABLES)))
        put(fleet, old.url, "lo-1")
        refused = await fleet.ask({**HELLO, "model": "lo-math"})
        assert refused.status_code == 503
        fleet.registry.put(Replica("lo-2", "lo", "int4", new.url, "m1", adapters=("math",)), State.STARTING)
        waiting = asyncio.create_task(fleet.ask({**HELLO, "model": "lo-math"}))
        await eventually(lambda: fleet.served.dispatcher.waiting() == {"lo-math": 1} or None)
        put(fleet, new.url, "lo-2", "math")
        assert (await waiting).headers["x-quantgate-replica"] == "lo-2"
        for _ in range(4):
            assert (await fleet.ask({**HELLO, "model": "math"})).headers["x-quantgate-replica"] == "lo-2"
        assert not old.requests(CHAT)


async def test_the_load_of_an_adapter_is_its_replicas_load() -> None:
    """Requests of base and adapter share the slots of a replica, and its metrics are polled once."""
    async with AsyncExitStack() as stack:
        fake = await stack.enter_async_context(running_fake(*LORA, "--fake-stall-after-tokens", "1"))
        fleet = await stack.enter_async_context(running_gateway(deployment(TABLES)))
        put(fleet, fake.url, "lo-1", "math", max_in_flight=1)
        first = asyncio.create_task(fleet.ask({**HELLO, "model": "lo-math"}))
        await fake.requested(CHAT)
        second = asyncio.create_task(fleet.ask({**HELLO, "model": "plain"}))
        await eventually(lambda: fleet.served.dispatcher.waiting() == {"plain": 1} or None)
        fake.resume()
        assert {(await task).status_code for task in (first, second)} == {200}
        metrics = await fleet.metrics("quantgate_replica_polls")
        assert {dict(labels)["variant"] for _, labels in metrics} == {"lo"}
