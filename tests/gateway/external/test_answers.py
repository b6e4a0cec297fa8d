"""Answers of external models through litellm: a client can't tell them from a replica's by their form."""

import base64
import json
from typing import Any

import pytest

from tests.fakes.protocols import IMAGE_WORDS
from tests.fakes.running import FakeReplica
from tests.gateway.fleet import TEXT, Fleet, error_of, events_in, text_of

pytestmark = pytest.mark.asyncio(loop_scope="session")

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "the weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
PIXEL = (
    "data:image/png;base64,"
    + base64.b64encode(
        bytes.fromhex(
            "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de"
            "0000000c4944415408d763f8cfc000000301010018dd8db00000000049454e44ae426082"
        )
    ).decode()
)
providers = pytest.mark.parametrize("model", ["gpt", "claude", "nova"])
CHUNK_KEYS = {"id", "object", "created", "model", "choices"}
CHOICE_KEYS = {"index", "delta", "logprobs", "finish_reason"}


def asking(model: str, said: Any, **more: Any) -> dict[str, Any]:
    """A chat."""
    return {"model": model, "messages": [{"role": "user", "content": said}], "max_tokens": 500, **more}


def tool_arguments(events: list[Any]) -> dict[int, str]:
    """The arguments of each call in a stream, joined."""
    calls: dict[int, str] = {}
    for event in events:
        for choice in event["choices"] if event != "[DONE]" else ():
            for call in choice["delta"].get("tool_calls") or ():
                calls[call["index"]] = calls.get(call["index"], "") + (call["function"].get("arguments") or "")
    return calls


@providers
async def test_a_whole_answer(fleet: Fleet, model: str) -> None:
    """Text, usage, the asked name, an id of the request, and the headers of every answer."""
    answer = await fleet.ask(asking(model, "hello"))
    assert answer.status_code == 200, answer.text
    fields = answer.json()
    assert fields["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "you said hello é汉"},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert (fields["model"], fields["object"]) == (model, "chat.completion")
    assert fields["id"] == f"chatcmpl-{answer.headers['x-request-id']}"
    assert set(fields) == {*CHUNK_KEYS, "usage"}
    assert fields["usage"]["prompt_tokens"] == 1000
    assert fields["usage"]["completion_tokens"] == 200
    assert {name: answer.headers[f"x-quantgate-{name}"] for name in ("variant", "precision", "replica", "reason")} == {
        "variant": model,
        "precision": "external",
        "replica": f"{model}-external",
        "reason": "pinned",
    }


@providers
async def test_a_stream(fleet: Fleet, model: str) -> None:
    """Chunks as vLLM writes them: the role first, then text, the reason, and usage only if it was asked for."""
    answer = await fleet.ask(asking(model, "hello", stream=True))
    assert answer.status_code == 200, answer.text
    events = events_in(answer.content)
    assert text_of(events) == "you said hello é汉"
    assert events[-1] == "[DONE]"
    assert {frozenset(event) for event in events[:-1]} == {frozenset(CHUNK_KEYS)}
    assert {frozenset(event["choices"][0]) for event in events[:-1]} == {frozenset(CHOICE_KEYS)}
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [event["choices"][0]["finish_reason"] for event in events[:-1]] == [None] * (len(events) - 2) + ["stop"]
    assert {(event["model"], event["id"]) for event in events[:-1]} == {
        (model, f"chatcmpl-{answer.headers['x-request-id']}")
    }
    answer = await fleet.ask(asking(model, "hello", stream=True, stream_options={"include_usage": True}))
    usage = events_in(answer.content)[-2]
    assert usage["choices"] == []
    assert (usage["usage"]["prompt_tokens"], usage["usage"]["completion_tokens"]) == (1000, 200)


@providers
@pytest.mark.parametrize("stream", [True, False])
async def test_a_tool_call(fleet: Fleet, model: str, stream: bool) -> None:
    """The call arrives with its id, its name, and arguments that are valid JSON."""
    answer = await fleet.ask(asking(model, "how is the weather", tools=[TOOL], stream=stream))
    assert answer.status_code == 200, answer.text
    if stream:
        events = events_in(answer.content)
        calls = [call for e in events[:-1] for c in e["choices"] for call in c["delta"].get("tool_calls") or ()]
        assert (calls[0]["id"], calls[0]["type"], calls[0]["function"]["name"]) == ("call_1", "function", "weather")
        assert not any("id" in call for call in calls[1:])
        arguments, reason = tool_arguments(events)[0], events[-2]["choices"][0]["finish_reason"]
    else:
        choice = answer.json()["choices"][0]
        (call,) = choice["message"]["tool_calls"]
        assert (call["id"], call["type"], call["function"]["name"]) == ("call_1", "function", "weather")
        arguments, reason = call["function"]["arguments"], choice["finish_reason"]
    assert json.loads(arguments) == {"city": "Paris"}
    assert reason == "tool_calls"


@providers
@pytest.mark.parametrize("stream", [True, False])
async def test_a_thought(fleet: Fleet, model: str, stream: bool) -> None:
    """Reasoning arrives in both of its fields, as that of a replica does."""
    answer = await fleet.ask(asking(model, "think", stream=stream))
    assert answer.status_code == 200, answer.text
    if stream:
        deltas = [choice["delta"] for event in events_in(answer.content)[:-1] for choice in event["choices"]]
        said = ["".join(delta.get(key) or "" for delta in deltas) for key in ("reasoning", "reasoning_content")]
        text = "".join(delta.get("content") or "" for delta in deltas)
    else:
        message = answer.json()["choices"][0]["message"]
        said, text = [message["reasoning"], message["reasoning_content"]], message["content"]
    assert said == ["I wonder", "I wonder"]
    assert text == "you said think é汉"


@providers
async def test_an_image(fleet: Fleet, model: str) -> None:
    """An image of a message arrives at the provider."""
    content = [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": PIXEL}}]
    answer = await fleet.ask(asking(model, content))
    assert answer.status_code == 200, answer.text
    assert IMAGE_WORDS in answer.json()["choices"][0]["message"]["content"]


async def test_completions_and_embeddings(fleet: Fleet) -> None:
    """Where the provider has them."""
    answer = await fleet.ask({"model": "gpt", "prompt": "hello"}, path=TEXT)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["text"] == "you said hello é汉"
    answer = await fleet.ask({"model": "gpt", "prompt": "hello", "stream": True}, path=TEXT)
    events = events_in(answer.content)
    assert "".join(event["choices"][0]["text"] for event in events[:-1]) == "you said hello é汉"
    answer = await fleet.ask({"model": "gpt", "input": "hello"}, path="/v1/embeddings")
    assert answer.status_code == 200, answer.text
    assert answer.json()["data"] == [{"object": "embedding", "index": 0, "embedding": [0.5, -0.5]}]


async def test_an_endpoint_that_providers_do_not_have(fleet: Fleet) -> None:
    """The error names those that they have; of an alias with replicas, only those are asked."""
    answer = await fleet.ask({"model": "gpt", "prompt": "hello"}, path="/tokenize")
    assert answer.status_code == 400
    assert error_of(answer)["code"] == "endpoint_not_supported"
    assert "/v1/chat/completions, /v1/completions, /v1/embeddings" in error_of(answer)["message"]
    answer = await fleet.ask({"model": "smol", "prompt": "hello"}, path="/tokenize")
    assert answer.status_code == 503
    assert error_of(answer)["code"] == "no_ready_replica"


@pytest.mark.parametrize(
    "field, value, pinned", [("n", 2, "claude"), ("structured_outputs", {"json": {}}, "gpt"), ("min_tokens", 5, "nova")]
)
async def test_a_field_that_would_be_dropped(
    fleet: Fleet, provider: FakeReplica, field: str, value: Any, pinned: str
) -> None:
    """It is refused where the model is pinned; of an alias with replicas, only those are asked."""
    before = len(provider.requests())
    answer = await fleet.ask(asking(pinned, "hello", **{field: value}))
    assert answer.status_code == 400
    assert (error_of(answer)["code"], error_of(answer)["param"]) == ("unsupported", field)
    ladder = "measured" if pinned == "claude" else "smol"
    answer = await fleet.ask(asking(ladder, "hello", **{field: value}))
    assert (answer.status_code, error_of(answer)["code"]) == (503, "no_ready_replica")
    assert len(provider.requests()) == before


@pytest.mark.parametrize(
    "messages", [["hi"], [{"role": "user", "content": [{"type": "file", "file": {"file_id": "f"}}]}]]
)
async def test_what_no_provider_gets(fleet: Fleet, provider: FakeReplica, messages: list[Any]) -> None:
    """It is the client's error: nothing is sent, and the model has not failed."""
    before = len(provider.requests())
    answer = await fleet.ask({"model": "claude", "messages": messages})
    assert answer.status_code == 400
    assert error_of(answer)["param"].startswith("messages")
    assert len(provider.requests()) == before
    assert fleet.served.dispatcher.breaker_states().get("claude-external", "closed") == "closed"


async def test_what_a_provider_gets(fleet: Fleet, provider: FakeReplica) -> None:
    """Only fields of OpenAI's API: none that changes where the request goes, of vLLM, or that names a user."""
    hostile = {
        "api_base": "http://127.0.0.1:1/v1",
        "base_url": "http://127.0.0.1:1/v1",
        "api_key": "stolen",
        "custom_llm_provider": "anthropic",
        "fallbacks": ["openai/other"],
        "mock_response": "mocked",
        "num_retries": 9,
        "extra_headers": {"x-extra": "1"},
        "extra_body": {"x": 1},
        "metadata": {"a": "b"},
        "user": "alice",
        "prompt_cache_key": "session-1",
        "chat_template_kwargs": {"enable_thinking": False},
        "top_k": 5,
        "min_p": 0.1,
    }
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello", "reasoning": "hm", "reasoning_content": "hm"},
        {"role": "user", "content": "hello"},
    ]
    body = {"model": "gpt", "messages": messages, "temperature": 0.5, "seed": 7, **hostile}
    answer = await fleet.ask(body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"] == "you said hello é汉"
    sent = provider.requests("/v1/chat/completions")[-1]
    assert sent["headers"]["authorization"] == "Bearer sk-secret"
    assert "x-extra" not in sent["headers"]
    assert sent["body"] == {
        "model": "gpt-4.1",
        "messages": [messages[0], {"role": "assistant", "content": "hello"}, messages[2]],
        "temperature": 0.5,
        "seed": 7,
    }
