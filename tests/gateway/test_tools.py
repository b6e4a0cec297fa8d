"""Requests with tools: which replicas get them, and what clients are told where no replica takes them."""

import asyncio
from contextlib import AsyncExitStack
from typing import Any

import pytest

from serving.replica import Replica, State
from tests.fakes.running import FakeReplica, eventually, running_fake
from tests.gateway.fleet import CHAT, Fleet, deployment, error_of, running_gateway

pytestmark = pytest.mark.asyncio(loop_scope="session")

TURNS = [{"role": "user", "content": "hello there"}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
FUNCTION = {"name": "weather", "parameters": SCHEMA}
# By path: a body with a tool, as the clients of that API write it.
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": TURNS, "tools": [{"type": "function", "function": FUNCTION}]},
    "/v1/responses": {"input": "hello there", "tools": [{"type": "function", **FUNCTION}]},
    "/v1/messages": {"messages": TURNS, "max_tokens": 9, "tools": [{"name": "weather", "input_schema": SCHEMA}]},
    "/v1/messages/count_tokens": {"messages": TURNS, "tools": [{"name": "weather", "input_schema": SCHEMA}]},
}
ALIASES = {"aliases": {"smol": {"ladder": ["hi", "lo"], "trust_declared": True}}}


def put(fleet: Fleet, fake: FakeReplica, replica_id: str, tools: bool | None, **options: Any) -> None:
    """Have a replica in the registry that takes tools, doesn't, or isn't known to."""
    variant = replica_id.partition("-")[0]
    fleet.registry.put(Replica(replica_id, variant, "any", fake.url, "m1", tools=tools, **options), State.READY)


@pytest.mark.parametrize("path", BODIES)
async def test_no_replica_takes_tools(path: str, fake: FakeReplica) -> None:
    """A clear 400 in the shape of the API, for tools that might be called; everything else is answered."""
    body = {"model": "smol", **BODIES[path]}
    none = {"type": "none"} if "messages" in path else "none"
    async with running_gateway(deployment(ALIASES)) as fleet:
        put(fleet, fake, "hi-1", False)
        put(fleet, fake, "lo-1", False)
        refused = await fleet.ask(body, path=path)
        assert refused.status_code == 400
        error = refused.json()["error"] if "messages" in path else error_of(refused)
        assert error["code"] == "tools_unsupported"
        assert error["type"] == "invalid_request_error"
        assert "'tools' is not supported by 'smol'" in error["message"]
        changes: list[dict[str, Any]] = [{"tool_choice": none}, {"tools": []}, {"tools": None}]
        for change in changes:
            assert (await fleet.ask({**body, **change}, path=path)).status_code == 200


async def test_tools_go_where_they_are_taken(fake: FakeReplica) -> None:
    """Of the replicas of one variant, and of a ladder's rungs, those answer that take tools; others answer the rest."""
    async with running_gateway(deployment(ALIASES)) as fleet:
        put(fleet, fake, "hi-1", False)
        put(fleet, fake, "lo-1", False)
        put(fleet, fake, "lo-2", True)
        for path, body in BODIES.items():
            for _ in range(3):
                answer = await fleet.ask({"model": "smol", **body}, path=path)
                assert (answer.status_code, answer.headers["x-quantgate-replica"]) == (200, "lo-2")
        plain = await fleet.ask({"model": "smol", "messages": TURNS})
        assert plain.headers["x-quantgate-replica"] == "hi-1"


async def test_unknown_replicas_are_asked(fake: FakeReplica) -> None:
    """A replica of which nobody knows gets requests with tools: its engine says what is wrong, if anything is."""
    async with running_gateway(deployment(ALIASES)) as fleet:
        put(fleet, fake, "hi-1", None)
        assert (await fleet.ask({"model": "smol", **BODIES[CHAT]})).status_code == 200


async def test_tools_wait_for_a_replica_that_takes_them() -> None:
    """While the only such replica is busy, they wait for it, though another one has room; other requests don't."""
    async with AsyncExitStack() as stack:
        slow = await stack.enter_async_context(running_fake("--fake-stall-after-tokens", "1"))
        other = await stack.enter_async_context(running_fake())
        fleet = await stack.enter_async_context(running_gateway(deployment(ALIASES)))
        put(fleet, slow, "hi-1", True, max_in_flight=1)
        put(fleet, other, "hi-2", False)
        body = {"model": "smol", **BODIES[CHAT]}
        first = asyncio.create_task(fleet.ask(body))
        await slow.requested(CHAT)
        second = asyncio.create_task(fleet.ask(body))

        async def waiting() -> bool:
            return bool((await fleet.admin.get("/admin/queue")).json() == {"smol": 1})

        await eventually(waiting)
        plain = await fleet.ask({"model": "smol", "messages": TURNS})
        assert plain.headers["x-quantgate-replica"] == "hi-2"
        slow.resume()
        answers = await asyncio.gather(first, second)
        assert [answer.headers["x-quantgate-replica"] for answer in answers] == ["hi-1", "hi-1"]
