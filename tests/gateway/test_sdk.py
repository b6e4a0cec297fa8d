"""The real OpenAI SDK against the gateway: what an application sees."""

from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
import pytest_asyncio
from openai import AsyncOpenAI

from tests.fakes.running import DEADLINE_SECONDS, FakeReplica
from tests.gateway.fleet import Fleet, deployment, running_gateway
from tests.gateway.keys.test_keys import KEY, KEYS
from tests.gateway.wire import answering, chunk, scripted, stream_head, whole

pytestmark = pytest.mark.asyncio(loop_scope="session")

HELLO: Any = [{"role": "user", "content": "hello there"}]
BEGUN = b'data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"m1","choices":[]}\n\n'


@pytest_asyncio.fixture(loop_scope="session")
async def sdk(fleet: Fleet) -> AsyncIterator[AsyncOpenAI]:
    """A client as an application makes it, but for retries."""
    async with AsyncOpenAI(
        base_url=f"{fleet.url}/v1", api_key="any", timeout=DEADLINE_SECONDS, max_retries=0
    ) as client:
        yield client


async def test_a_whole_answer(fleet: Fleet, fake: FakeReplica, sdk: AsyncOpenAI) -> None:
    """Text, usage, the asked name, and the id that support will ask for."""
    with fleet.replicas(("hi", fake.url)):
        answer = await sdk.chat.completions.create(model="smol", messages=HELLO, n=2, max_tokens=4)
        text = await sdk.completions.create(model="smol", prompt="hello", max_tokens=3)
    assert [choice.message.content for choice in answer.choices] == ["m1 heard hello there", "m1#1 heard hello there"]
    assert answer.model == text.model == "smol"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8
    assert answer._request_id.startswith("req-")
    assert text.choices[0].text == "m1 heard hello"


async def test_a_stream(fleet: Fleet, fake: FakeReplica, sdk: AsyncOpenAI) -> None:
    """Chunks with text, and at the end the usage that was asked for."""
    with fleet.replicas(("hi", fake.url)):
        usage: Any = {"include_usage": True}
        asked = await sdk.chat.completions.create(model="smol", messages=HELLO, stream=True, stream_options=usage)
        chunks = [chunk async for chunk in asked]
        plain = await sdk.chat.completions.create(model="smol", messages=HELLO, stream=True)
        without = [chunk async for chunk in plain]
    text = "".join(each.choices[0].delta.content or "" for each in without)
    assert text.startswith("m1 heard hello there café 汉字")
    assert {each.model for each in chunks} == {"smol"}
    assert [each.usage.completion_tokens for each in chunks if each.usage] == [16]
    assert len(chunks) == len(without) + 1


async def test_who_answered_is_in_the_headers(fleet: Fleet, fake: FakeReplica, sdk: AsyncOpenAI) -> None:
    """An application that wants to know which precision answered can."""
    provider = {"provider": {"quantizations": ["int4"]}}
    with fleet.replicas(("hi", fake.url), ("lo", fake.url)):
        raw = await sdk.chat.completions.with_raw_response.create(model="smol", messages=HELLO, extra_body=provider)
        headers = {"x-quantgate-precision": "int4"}
        streamed = await sdk.chat.completions.with_raw_response.create(
            model="smol", messages=HELLO, extra_headers=headers, stream=True
        )
        _ = [chunk async for chunk in streamed.parse()]
    for answer in (raw, streamed):
        assert answer.headers["x-quantgate-variant"] == "lo"
        assert answer.headers["x-quantgate-precision"] == "int4"
        assert answer.headers["x-quantgate-reason"] == "floor"
        assert answer.request_id == answer.headers["x-request-id"]
        assert answer.retries_taken == 0


async def test_models(fleet: Fleet, sdk: AsyncOpenAI) -> None:
    """Listing and retrieving work, for a name with a slash, too."""
    assert [model.id async for model in sdk.models.list()][:3] == ["smol", "strict", "team/small"]
    model = await sdk.models.retrieve("team/small")
    assert (model.id, model.owned_by, model.model_dump()["precisions"]) == ("team/small", "quantgate", ["int4"])
    with pytest.raises(openai.NotFoundError):
        await sdk.models.retrieve("gpt-4o")


BUSY = whole(b'{"error":{"message":"busy"}}', "503 Busy")
BROKEN = whole(b"<html>secret</html>", "502 Bad Gateway")


@pytest.mark.parametrize(
    "changes, error, status, code, words",
    [
        ({"model": "gpt-4o"}, openai.NotFoundError, 404, "model_not_found", "the model 'gpt-4o' does not exist"),
        ({"n": 99}, openai.BadRequestError, 400, "invalid_request", "'n' is 99, the limit is 4"),
        ({"max_tokens": 10**9}, openai.BadRequestError, 400, "invalid_request", "cannot be greater than max_model_len"),
        (
            {"extra_headers": {"x-quantgate-floor": "a=1"}},
            openai.BadRequestError,
            400,
            "invalid_request",
            "unknown measure",
        ),
        ({"model": "hopeless"}, openai.InternalServerError, 503, "quality_floor_unmet", "is good enough"),
        ({"model": "mid"}, openai.InternalServerError, 503, "no_ready_replica", "no replica of 'mid' is ready"),
        (
            {"messages": [{"role": "user", "content": "x" * 70_000}]},
            openai.APIStatusError,
            413,
            "request_too_large",
            "65536",
        ),
    ],
)
async def test_errors_are_the_sdks_own(
    fleet: Fleet,
    fake: FakeReplica,
    sdk: AsyncOpenAI,
    changes: dict[str, Any],
    error: type[openai.APIStatusError],
    status: int,
    code: str,
    words: str,
) -> None:
    """Each refusal is the exception that applications catch, with a reason that people can read."""
    with fleet.replicas(("hi", fake.url)), pytest.raises(error) as caught:
        await sdk.chat.completions.create(**{"model": "smol", "messages": HELLO, **changes})
    assert type(caught.value) is error
    assert (caught.value.status_code, caught.value.code) == (status, code)
    assert words in str(caught.value)
    assert caught.value.request_id is not None


@pytest.mark.parametrize("said, status, code", [(BROKEN, 502, "upstream_error")])
@pytest.mark.parametrize("streaming", [False, True])
async def test_failing_replicas(
    fleet: Fleet, sdk: AsyncOpenAI, said: bytes, status: int, code: str, streaming: bool
) -> None:
    """A fleet that fails is a server error, whole and streamed, and nothing of its text gets out."""
    async with scripted(answering(said)) as replica:
        with fleet.replicas(("hi", replica.url)), pytest.raises(openai.InternalServerError) as caught:
            await sdk.chat.completions.create(model="smol", messages=HELLO, stream=streaming)
    assert (caught.value.status_code, caught.value.code) == (status, code)
    assert "secret" not in str(caught.value)


async def test_a_stream_that_breaks_is_an_error(fleet: Fleet, sdk: AsyncOpenAI) -> None:
    """A replica that dies after the first chunk is an exception, not an answer that is too short."""
    async with scripted(answering(stream_head() + chunk(BEGUN))) as replica:
        with fleet.replicas(("hi", replica.url)):
            seen = []
            with pytest.raises(openai.APIError) as caught:
                async for each in await sdk.chat.completions.create(model="smol", messages=HELLO, stream=True):
                    seen.append(each.model)  # noqa: PERF401 - what came before an error is wanted
    assert seen == ["smol"]
    assert (caught.value.code, caught.value.type) == ("upstream_disconnected", "upstream_error")
    assert "closed the connection too early" in caught.value.message


async def test_keys(fake: FakeReplica) -> None:
    """The SDK's key is the gateway's; another one is an AuthenticationError."""
    async with running_gateway(deployment(keys=KEYS)) as fleet:
        for key in (KEY, "sk-other"):
            async with AsyncOpenAI(base_url=f"{fleet.url}/v1", api_key=key, timeout=DEADLINE_SECONDS) as client:
                with fleet.replicas(("hi", fake.url)):
                    if key == KEY:
                        answer = await client.chat.completions.create(model="smol", messages=HELLO)
                        assert answer.model == "smol"
                    else:
                        with pytest.raises(openai.AuthenticationError, match="is not known"):
                            await client.models.list()


async def test_the_sdk_does_not_retry_what_was_tried_everywhere(fleet: Fleet, fake: FakeReplica) -> None:
    """When every replica that may answer has failed, the SDK is told not to start all over."""
    async with scripted(answering(BROKEN)) as replica:
        with fleet.replicas(("hi", replica.url)):
            async with AsyncOpenAI(
                base_url=f"{fleet.url}/v1", api_key="any", timeout=DEADLINE_SECONDS, max_retries=1
            ) as client:
                with pytest.raises(openai.InternalServerError):
                    await client.chat.completions.create(model="smol", messages=HELLO)
        assert len(replica.peers) == 1
