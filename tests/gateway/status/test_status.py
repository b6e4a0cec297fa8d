"""`/admin/status` of a running gateway."""

import asyncio
import os
from typing import Any

import pytest

from gateway.app import gateway, listen_sockets
from gateway.status.values import Status, read_status
from gateway.workers import WorkerIndex
from serving.registry import Registry
from serving.replica import Replica, State
from tests.fakes.running import DEADLINE_SECONDS, POLL_SECONDS, FakeReplica
from tests.gateway.fleet import HELLO, STREAM, Fleet, clients, deployment, running_gateway

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def status_of(fleet: Fleet) -> Status:
    """The status now."""
    answer = await fleet.admin.get("/admin/status")
    assert (answer.status_code, answer.headers["cache-control"]) == (200, "no-store")
    return read_status(answer.content)


async def test_without_replicas(fleet: Fleet) -> None:
    """Aliases have their whole ladders, each rung says why it may not answer, or that it has no replica."""
    status = await status_of(fleet)
    assert status.version == 1
    assert [alias.name for alias in status.aliases] == ["smol", "strict", "team/small", "hopeless"]
    smol, strict, small, hopeless = status.aliases
    assert [(rung.variant, rung.precision, rung.state) for rung in smol.rungs] == [
        ("hi", "bf16", "no_replica"),
        ("mid", "int8", "no_replica"),
        ("lo", "int4", "no_replica"),
    ]
    assert smol.answers_now is None
    assert strict.floor == {"top1_agreement": 0.95}
    assert [rung.rejected for rung in strict.rungs] == [None, None, "top1_agreement 0.92 misses the floor 0.95"]
    assert [rung.state for rung in hopeless.rungs] == ["rejected", "rejected"]
    assert (small.waiting, small.canary) == (0, None)
    assert status.gateway.worker.of == 1
    assert not status.gateway.draining


async def test_variants(fleet: Fleet) -> None:
    """Each has its measures with their bounds, where they come from, and no speed without a measurement."""
    variants = {variant.name: variant for variant in (await status_of(fleet)).variants}
    measures = {each.name: (each.value, each.bound) for each in variants["mid"].measures}
    assert measures == {"top1_agreement": (0.97, 0.97), "kl_mean": (0.01, 0.01), "perplexity_ratio": (1.01, 1.01)}
    assert (variants["mid"].source, variants["mid"].speed, variants["odd"].measures) == ("declared", None, ())


async def test_replicas_and_traffic(fake: FakeReplica) -> None:
    """Who answers now, what each replica is doing, shares of traffic, and tokens by precision."""
    async with running_gateway(deployment()) as fleet:
        with fleet.replicas(("hi", fake.url), ("lo", fake.url)):
            for body in (HELLO, STREAM, {**HELLO, "model": "lo"}):
                assert (await fleet.ask(body)).status_code == 200
            await fleet.at_rest()
            fleet.registry.put(
                Replica("mid-1", "mid", "int8", "http://x", "m", api_key="secret"), State.FAILED, "crash"
            )
            status = await status_of(fleet)
        smol = status.aliases[0]
        assert smol.answers_now is not None
        assert (smol.answers_now.replica, smol.answers_now.reason) == ("hi-0", "preferred")
        assert [(rung.state, rung.replicas_ready, rung.requests, rung.share) for rung in smol.rungs] == [
            ("answers", 1, 2, 1.0),
            ("no_replica", 0, 0, 0.0),
            ("ready", 1, 0, 0.0),
        ]
        replicas = {replica.id: replica for replica in status.replicas}
        assert (replicas["hi-0"].state, replicas["hi-0"].breaker, replicas["hi-0"].silence) == (
            *("ready", "closed"),
            "responsive",
        )
        assert (replicas["mid-1"].state, replicas["mid-1"].reason) == ("failed", "crash")
        assert b"secret" not in status.to_json()
        recent = status.traffic.recent
        assert recent is not None
        assert {name: rate.answer_tokens_per_second > 0 for name, rate in recent.precisions.items()} == {
            "bf16": True,
            "int4": True,
        }


async def test_polled_load(fake: FakeReplica) -> None:
    """What a replica's engine says of its load is in the status once it was polled."""
    async with running_gateway(deployment()) as fleet:
        with fleet.replicas(("hi", fake.url)):
            async with asyncio.timeout(DEADLINE_SECONDS):
                while not (replica := (await status_of(fleet)).replicas[0]).load_known:  # noqa: ASYNC110
                    await asyncio.sleep(POLL_SECONDS)
    assert (replica.running, replica.waiting, replica.in_flight) == (0, 0, 0)
    assert replica.kv_usage is not None


async def test_errors(fleet: Fleet) -> None:
    """What clients were refused with is listed with its request id."""
    answer = await fleet.ask({**HELLO, "model": "hopeless"}, {"x-request-id": "req-of-a-test"})
    error = (await status_of(fleet)).errors[0]
    assert answer.status_code == 503
    assert (error.alias, error.code, error.replica, error.request_id) == ("hopeless", "503", "none", "req-of-a-test")
    assert "no variant of 'hopeless' is good enough" in error.message


async def test_waiting_requests(fleet: Fleet) -> None:
    """Requests that wait for a replica are counted by alias."""
    with fleet.replicas(("hi", "http://127.0.0.1:9"), state=State.STARTING):
        task = asyncio.create_task(fleet.ask())
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not (status := await status_of(fleet)).aliases[0].waiting:  # noqa: ASYNC110
                await asyncio.sleep(POLL_SECONDS)
        task.cancel()
        await fleet.at_rest()
    assert (status.aliases[0].waiting, status.gateway.in_flight) == (1, 1)


async def test_needs_the_admin_key() -> None:
    """With gateway.admin_key the status needs it."""
    settings: dict[str, Any] = {"listen": "127.0.0.1:0", "admin": "127.0.0.1:0", "admin_key": "operators"}
    async with running_gateway(deployment({"gateway": settings})) as fleet:
        assert (await fleet.admin.get("/admin/status")).status_code == 401
        headers = {"authorization": "Bearer operators"}
        assert (await fleet.admin.get("/admin/status", headers=headers)).status_code == 200


async def test_one_of_several_workers() -> None:
    """The status says which process it is of: its traffic and errors are not those of the others."""
    setup = deployment()
    with listen_sockets(setup.settings.gateway) as taken:
        async with gateway(setup, Registry(), taken, WorkerIndex(2, 4)) as served, clients(served.addresses) as both:
            worker = read_status((await both[1].get("/admin/status")).content).gateway.worker
    assert (worker.number, worker.of, worker.process_id) == (2, 4, os.getpid())


async def test_its_schema_is_described(fleet: Fleet) -> None:
    """The OpenAPI document of the port has the schema of the status (tests/conformance holds answers against it)."""
    document = (await fleet.admin.get("/admin/openapi.json")).json()
    schema = document["components"]["schemas"]["Status"]
    assert schema["properties"]["version"]["enum"] == [1]
    assert set(schema["required"]) >= {"aliases", "replicas", "traffic"}
