"""Requests to the fake replica."""

import json
from typing import Any

import httpx

from tests.fakes.running import DEADLINE_SECONDS, FakeReplica

CHAT = "/v1/chat/completions"
HELLO: dict[str, Any] = {"model": "m1", "messages": [{"role": "user", "content": "hello there"}]}


def client_of(replica: FakeReplica) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=replica.url, timeout=DEADLINE_SECONDS, trust_env=False)


def events_in(body: bytes) -> list[Any]:
    events = body.decode().split("\n\n")
    assert events.pop() == "", "the body ends behind an event"
    return [json.loads(event.removeprefix("data: ")) if event != "data: [DONE]" else "[DONE]" for event in events]


async def ask(replica: FakeReplica, path: str = CHAT, **changes: Any) -> httpx.Response:
    async with client_of(replica) as client:
        return await client.post(path, json={**HELLO, **changes})


async def events_until_end(replica: FakeReplica, **changes: Any) -> list[Any]:
    answer = await ask(replica, stream=True, **changes)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    return events_in(answer.content)
