"""`/v1/responses` of external models, by the real OpenAI SDK; and the endpoints that they do not answer."""

import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
import pytest_asyncio
from openai import AsyncOpenAI

from tests.fakes.running import DEADLINE_SECONDS, FakeReplica
from tests.gateway.external.conftest import ANSWER_USD
from tests.gateway.external.test_answers import providers
from tests.gateway.fleet import Fleet

pytestmark = pytest.mark.asyncio(loop_scope="session")

TOOLS: Any = [
    {
        "type": "function",
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    }
]


@pytest_asyncio.fixture(loop_scope="session")
async def sdk(fleet: Fleet) -> AsyncIterator[AsyncOpenAI]:
    """A client as an application makes it, but for retries."""
    async with AsyncOpenAI(
        base_url=f"{fleet.url}/v1", api_key="any", timeout=DEADLINE_SECONDS, max_retries=0
    ) as client:
        yield client


@providers
async def test_a_whole_response(fleet: Fleet, sdk: AsyncOpenAI, model: str) -> None:
    """Text, usage, the asked name, an id of ours, and its cost."""
    before = await fleet.total("quantgate_external_cost_usd_total", alias=model)
    answer = await sdk.responses.create(model=model, input="hello", instructions="be nice", max_output_tokens=99)
    assert answer.output_text == "you said hello é汉"
    assert (answer.model, answer.status, answer.error) == (model, "completed", None)
    assert answer.id.startswith("resp_req-")
    assert answer.usage is not None
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (1000, 200)
    cost = await fleet.total("quantgate_external_cost_usd_total", alias=model)
    assert cost - before == pytest.approx(ANSWER_USD)


@providers
async def test_a_streamed_response(sdk: AsyncOpenAI, model: str) -> None:
    """Events in their order; a thought is reasoning, and no event names the provider."""
    events = [event async for event in await sdk.responses.create(model=model, input="think", stream=True)]
    assert [event.type for event in events][:2] == ["response.created", "response.in_progress"]
    assert events[-1].type == "response.completed"
    assert (
        "".join(event.delta for event in events if event.type == "response.output_text.delta") == "you said think é汉"
    )
    assert "reasoning" in {event.item.type for event in events if event.type == "response.output_item.added"}
    ids = {event.response.id for event in events if hasattr(event, "response")}
    assert len(ids) == 1
    assert ids.pop().startswith("resp_req-")
    assert events[-1].response.model == model


@providers
async def test_a_tool_call(sdk: AsyncOpenAI, model: str) -> None:
    """The call in a stream, and its result in the next turn, without the thoughts of the first."""
    asked: Any = [{"role": "user", "content": "how is the weather"}]
    stream = await sdk.responses.create(model=model, input=asked, tools=TOOLS, stream=True)
    (done,) = [event.response async for event in stream if event.type == "response.completed"]
    (call,) = [item for item in done.output if item.type == "function_call"]
    assert (call.name, call.call_id, json.loads(call.arguments)) == ("weather", "call_1", {"city": "Paris"})
    turn: Any = [
        *asked,
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"type": "function_call", "call_id": "call_1", "name": "weather", "arguments": call.arguments},
        {"type": "function_call_output", "call_id": "call_1", "output": "rain"},
        {"role": "user", "content": "thanks"},
    ]
    answer = await sdk.responses.create(model=model, input=turn)
    assert answer.status == "completed"


@providers
async def test_a_response_that_breaks_off(sdk: AsyncOpenAI, model: str) -> None:
    """The SDK raises."""
    for said in ("begin and die", "begin and end"):
        stream = await sdk.responses.create(model=model, input=said, stream=True)
        with pytest.raises(openai.APIError):
            async for _ in stream:
                pass


async def test_a_client_that_leaves(sdk: AsyncOpenAI, provider: FakeReplica) -> None:
    """The request to the provider is closed."""
    before = len(provider.endings())
    stream = await sdk.responses.create(model="claude", input="begin and stall", stream=True)
    async for event in stream:
        if event.type == "response.output_text.delta":
            break
    await stream.close()
    await provider.ended(before + 1)
    assert provider.endings()[-1] == {"event": "aborted"}
