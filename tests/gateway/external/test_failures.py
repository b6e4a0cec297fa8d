"""What clients see when a provider fails, and what a provider sees when clients leave."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from serving.replica import State
from tests.fakes.running import FakeReplica, eventually
from tests.gateway.external.test_answers import asking, providers
from tests.gateway.fleet import CHAT, JSON, Fleet, error_of, events_in, text_of

pytestmark = pytest.mark.asyncio(loop_scope="session")


@providers
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "said, status, code",
    [
        ("fail 400", 400, None),
        ("fail 401", 502, "upstream_misconfigured"),
        ("fail 403", 502, "upstream_misconfigured"),
        ("fail 404", 502, "upstream_misconfigured"),
        ("fail 500", 502, "upstream_error"),
    ],
)
async def test_an_error_of_the_provider(
    fleet: Fleet, provider: FakeReplica, model: str, stream: bool, said: str, status: int, code: str | None
) -> None:
    """It is of the same tree as one of a replica, and sent once; only a client's own error has its words."""
    before = len(provider.requests())
    answer = await fleet.ask(asking(model, said, stream=stream))
    assert answer.status_code == status, answer.text
    error = error_of(answer)
    assert code in (None, error["code"])
    assert ("it said fail" in error["message"]) == (status == 400)
    assert "litellm" not in answer.text.lower()
    assert len(provider.requests()) == before + 1


async def test_a_provider_that_limits_requests(fleet: Fleet) -> None:
    """429 is no failure: the model is spared for as long as it says, and the request waits."""
    overloads = fleet.served.dispatcher.cluster.overloads
    async with one_that_leaves(fleet, asking("limited", "fail 429", stream=True)):
        overload = await eventually(lambda: overloads.get("limited-external"))
    assert overload.until - fleet.served.dispatcher.now() > 5
    assert await fleet.total("quantgate_requests_total", variant="limited") == 0


async def test_no_connection(fleet: Fleet) -> None:
    """A provider that cannot be reached is a replica that cannot be reached."""
    answer = await fleet.ask(asking("gone", "hello"))
    assert answer.status_code == 502
    assert error_of(answer)["code"] == "upstream_unreachable"


@pytest.mark.parametrize("model, stream", [("quick", True), ("hurried", True), ("hurried", False)])
async def test_a_provider_that_is_silent(fleet: Fleet, provider: FakeReplica, model: str, stream: bool) -> None:
    """The timeouts of the alias hold, and end the request at the provider; `first_byte_seconds` is for streams."""
    before = len(provider.endings())
    answer = await fleet.ask(asking(model, "stall", stream=stream))
    assert answer.status_code == 504
    assert error_of(answer)["code"] == "upstream_timeout"
    await provider.ended(before + 1)
    assert provider.endings()[-1] == {"event": "aborted"}


@providers
async def test_a_stream_that_breaks_off(fleet: Fleet, model: str) -> None:
    """Whether the connection closes, or the body just ends: the stream ends with an error, not as if it were whole."""
    for said in ("begin and die", "begin and end"):
        answer = await fleet.ask(asking(model, said, stream=True))
        events = events_in(answer.content)
        assert text_of(events[:-1]).startswith("you said"), said
        assert events[-1]["error"]["code"] == "upstream_disconnected", said
        assert "[DONE]" not in events


async def test_a_stream_that_stalls(fleet: Fleet, provider: FakeReplica) -> None:
    """The idle timeout ends it, also at the provider."""
    before = len(provider.endings())
    answer = await fleet.ask(asking("quick", "begin and stall", stream=True))
    assert events_in(answer.content)[-1]["error"]["code"] == "upstream_timeout"
    await provider.ended(before + 1)
    assert provider.endings()[-1] == {"event": "aborted"}


@providers
@pytest.mark.parametrize("said, stream", [("stall", False), ("stall", True), ("begin and stall", True)])
async def test_a_client_that_leaves(fleet: Fleet, provider: FakeReplica, model: str, said: str, stream: bool) -> None:
    """The request to the provider is closed: nobody pays for what nobody reads."""
    asked, before = len(provider.requests()), len(provider.endings())
    async with one_that_leaves(fleet, asking(model, said, stream=stream)):
        await eventually(lambda: len(provider.requests()) > asked)
    await provider.ended(before + 1)
    assert provider.endings()[-1] == {"event": "aborted"}


@contextlib.asynccontextmanager
async def one_that_leaves(fleet: Fleet, body: dict[str, Any]) -> AsyncIterator[None]:
    """Ask, and close the connection at the end of the block; of a stream that has begun, after its first bytes."""

    async def ask(begun: asyncio.Event) -> None:
        async with fleet.client.stream("POST", CHAT, json=body, headers=JSON) as answer:
            async for _ in answer.aiter_raw():
                begun.set()

    begun = asyncio.Event()
    task = asyncio.create_task(ask(begun))
    try:
        yield
        if body["messages"][0]["content"].startswith("begin"):
            await begun.wait()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_an_external_model_is_a_replica_of_its_variant(fleet: Fleet) -> None:
    """The admin port shows it, without any secret; nobody polls it."""
    page = await fleet.admin.get("/admin/replicas")
    (shown,) = [each for each in page.json() if each["id"] == "gpt-external"]
    assert (shown["precision"], shown["state"], shown["source"]) == ("external", State.READY, "external models")
    for path in ("/admin/replicas", "/admin/routing", "/metrics"):
        text = (await fleet.admin.get(path)).text
        assert "sk-secret" not in text
        assert "secret-of-aws" not in text
    assert not await fleet.total("quantgate_replica_polls_total", replica="gpt-external")
