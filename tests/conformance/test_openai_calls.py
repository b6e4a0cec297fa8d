"""Every call of the OpenAI SDK that the gateway answers, by three generations of it, in front of a fake vLLM."""

from typing import Any

import pytest

from tests.conformance.clients import OPENAI, called, text_of
from tests.conformance.rows import rows
from tests.fakes.running import FakeReplica

pytestmark = pytest.mark.asyncio(loop_scope="session")

MODEL = "team/small"
HELLO = [{"role": "user", "content": "hello there"}]
CHAT: dict[str, Any] = {"model": MODEL, "messages": HELLO}
SAID = "m1 heard hello there café 汉字"
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CALLING = {**CHAT, "tools": [TOOL], "tool_choice": "required"}

CALLS: list[tuple[str, dict[str, Any]]] = [
    ("chat", CHAT),
    ("chat", {**CHAT, "stream": True}),
    ("chat", {**CHAT, "stream": True, "stream_options": {"include_usage": True}}),
    ("chat", {**CALLING, "stream": True}),
    ("chat", {**CHAT, "n": 2, "logprobs": True, "max_tokens": 4}),
    ("text", {"model": MODEL, "prompt": "hello", "max_tokens": 3}),
    ("embeddings", {"model": MODEL, "input": "ab"}),
    ("embeddings", {"model": MODEL, "input": ["ab", "c"], "encoding_format": "float"}),
    ("embeddings", {"model": MODEL, "input": [[97, 98], [99]]}),
    ("responses", {"model": MODEL, "input": "hello there", "metadata": {"model": "m1"}}),
    ("responses", {"model": MODEL, "input": "hello there", "stream": True}),
    ("models.retrieve", {"model": MODEL}),
    ("models.list", {}),
]


@pytest.mark.parametrize("sync", [False, True], ids=["async", "sync"])
@pytest.mark.parametrize("client", OPENAI)
async def test_calls(client: str, sync: bool, fake: FakeReplica) -> None:
    """What comes back has the SDK's own types, the asked name, and nothing that wasn't asked for."""
    calls = [
        {"sdk": "openai", "call": call, "sync": sync and call != "models.list", "arguments": arguments}
        for call, arguments in CALLS
    ]
    async with rows({MODEL: fake.url}) as fleet:
        results = await called(client, fleet.url, calls)
    assert [result["error"] for result in results if "error" in result] == []
    chat, stream, counted, tools, several, text, *rest = [result["items"] for result in results]
    vectors, floats, tokens, response, events, model, listed = rest
    assert chat[0]["choices"][0]["message"]["content"].startswith(SAID)
    assert results[0]["request_id"].startswith("req-")
    assert text_of(stream) == text_of(counted) == chat[0]["choices"][0]["message"]["content"]
    assert [chunk.get("usage") for chunk in stream] == [None] * len(stream)
    assert [chunk["usage"]["completion_tokens"] for chunk in counted if chunk.get("usage")] == [16]
    assert arguments_in(tools) == '{"heard": "hello there", "café": "汉字"}'
    assert [len(choice["logprobs"]["content"]) for choice in several[0]["choices"]] == [4, 4]
    assert text[0]["choices"][0]["text"] == "m1 heard hello"
    ab, c = [2.0, 195.0, 12.125, 12.25], [1.0, 99.0, 12.375, 12.375]
    assert [[each["embedding"] for each in answer[0]["data"]] for answer in (vectors, floats, tokens)] == [
        *([ab], [ab, c], [ab, c])
    ]
    assert response[0]["output"][0]["content"][0]["text"].startswith(SAID)
    assert response[0]["metadata"] == {"model": "m1"}
    assert [event["type"] for event in events][:2] == ["response.created", "response.in_progress"]
    assert events[-1]["type"] == "response.completed"
    assert events[-1]["response"]["usage"]["output_tokens"] == 16
    assert "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta").startswith(SAID)
    assert model[0]["id"] == MODEL
    assert listed[0]["data"][0]["id"] == MODEL
    named = [chat[0], *stream, *counted, *tools, several[0], text[0], vectors[0], response[0], events[-1]["response"]]
    assert {each["model"] for each in named} == {MODEL}


def arguments_in(chunks: list[dict[str, Any]]) -> str:
    """What a tool was called with."""
    deltas = [choice["delta"].get("tool_calls") or [] for chunk in chunks for choice in chunk["choices"]]
    return "".join(call["function"]["arguments"] or "" for calls in deltas for call in calls)


async def test_langchain(fake: FakeReplica) -> None:
    """ChatOpenAI and OpenAIEmbeddings; a stream without usage, which it doesn't ask other servers than OpenAI's for."""
    async with rows({"smol": fake.url}) as fleet:
        (result,) = await called("langchain", fleet.url, [{"sdk": "langchain", "model": "smol", "arguments": {}}])
    assert "error" not in result, result
    said, streamed, vectors = result["items"]
    assert said == streamed
    assert said.startswith(SAID)
    assert vectors == [[2.0, 195.0, 12.125, 12.25], [1.0, 99.0, 12.375, 12.375]]
    assert result["usage"]["output_tokens"] == 16


async def test_llama_index(fake: FakeReplica) -> None:
    """OpenAILike."""
    async with rows({"smol": fake.url}) as fleet:
        (result,) = await called("llama-index", fleet.url, [{"sdk": "llama-index", "model": "smol", "arguments": {}}])
    assert "error" not in result, result
    assert result["items"][0] == result["items"][1]
    assert result["items"][0].startswith(SAID)
