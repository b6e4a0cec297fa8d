"""The fake replica's endpoints and answers, compared with recorded ones."""

import base64
import json
import struct
from typing import Any

import httpx
import pytest

from tests.asking_fakes import HELLO, ask, client_of, events_until_end
from tests.fakes.running import ROOT, running_fake

RECORDED = ROOT / "tests" / "fakes" / "recorded"
TOOLS: dict[str, Any] = {
    "tools": [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}],
    "tool_choice": "required",
}


def shapes_in(body: bytes) -> list[tuple[str, Any]]:
    """The name of each event and the form of its data, in order; of equal neighbours only the first."""
    shapes: list[tuple[str, Any]] = []
    for event in body.decode().split("\n\n")[:-1]:
        name, _, data = event.rpartition("data: ")
        shape = (name, "[DONE]" if data == "[DONE]" else shape_of(json.loads(data)))
        if shape not in shapes[-1:]:
            shapes.append(shape)
    return shapes


def shape_of(value: Any) -> Any:
    """Keys in their order, and kinds of values."""
    if isinstance(value, dict):
        # What a client calls its own things has no form.
        return [(key, key if key in ("metadata", "input") else shape_of(each)) for key, each in value.items()]
    if isinstance(value, list):
        return [shape_of(each) for each in value[:1]]
    return type(value).__name__ if value is not None else "null"


MESSAGE: dict[str, Any] = {"model": "m1", "max_tokens": 64, "messages": HELLO["messages"], "stream": True}


@pytest.mark.parametrize(
    "name, flags, path, body",
    [
        ("messages-text", (), "/v1/messages", MESSAGE),
        ("messages-reasoning", ("--fake-reasoning-tokens", "4"), "/v1/messages", MESSAGE),
        ("responses-text", (), "/v1/responses", {"model": "m1", "input": "hello", "stream": True, "metadata": {}}),
    ],
)
async def test_streams_have_the_form_of_recorded_ones(
    name: str, flags: tuple[str, ...], path: str, body: dict[str, Any]
) -> None:
    """What the fake sends has the events, and the keys in the order, that vLLM's own classes write."""
    async with running_fake(*flags) as replica, client_of(replica) as client:
        answer = await client.post(path, json=body)
    assert shapes_in(answer.content) == shapes_in((RECORDED / f"{name}.sse").read_bytes())


async def test_embeddings() -> None:
    """Text and its tokens give the same vector, as floats and as base64, in the order of the inputs."""
    async with running_fake() as replica, client_of(replica) as client:
        inputs: list[Any] = ["ab", ["ab", "c"], [97, 98], [[97, 98], [99]]]
        answers = [
            (await client.post("/v1/embeddings", json={"input": each, "encoding_format": kind})).json()
            for each in inputs
            for kind in ("float", "base64")
        ]
        wrong = await client.post("/v1/embeddings", json={"input": "ab", "encoding_format": "x"})
    vectors = [[each["embedding"] for each in answer["data"]] for answer in answers]
    ab, c = [2.0, 195.0, 12.125, 12.25], [1.0, 99.0, 12.375, 12.375]
    assert vectors[::2] == [[ab], [ab, c], [ab], [ab, c]]
    unpacked = [list(struct.unpack("<4f", base64.b64decode(each))) for each in vectors[3]]
    assert unpacked == [ab, c]
    assert answers[2]["usage"]["prompt_tokens"] == 3
    assert (wrong.status_code, wrong.json()["error"]["type"]) == (400, "Bad Request")


async def test_messages() -> None:
    """A message in blocks, its tokens counted beforehand; errors in Anthropic's form but for a body that is none."""
    async with running_fake("--fake-tokens", "3") as replica, client_of(replica) as client:
        body = {**MESSAGE, "stream": False, "system": [{"type": "text", "text": "Be kind."}]}
        answer = (await client.post("/v1/messages", json=body)).json()
        counted = (await client.post("/v1/messages/count_tokens", json=body)).json()
        unknown = await client.post("/v1/messages", json={**body, "model": "m2"})
        invalid = await client.post("/v1/messages", json={"model": "m1", "messages": []})
    assert answer["content"] == [{"type": "text", "text": "m1 heard hello"}]
    assert (answer["type"], answer["stop_reason"]) == ("message", "end_turn")
    assert answer["usage"] == {"input_tokens": counted["input_tokens"], "output_tokens": 3}
    assert (unknown.status_code, unknown.json()["type"]) == (404, "error")
    assert unknown.json()["error"]["type"] == "NotFoundError"
    assert (invalid.status_code, invalid.json()["error"]["type"]) == (400, "Bad Request")


async def test_responses() -> None:
    """A response repeats what was asked, and may end early."""
    async with running_fake() as replica, client_of(replica) as client:
        body = {"model": "m1", "input": [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}]}
        cut = (await client.post("/v1/responses", json={**body, "max_output_tokens": 3, "metadata": {"a": "b"}})).json()
    assert cut["output"][0]["content"][0]["text"] == "m1 heard hi"
    assert (cut["status"], cut["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert cut["metadata"] == {"a": "b"}
    assert cut["usage"]["output_tokens"] == 3


async def test_a_tool_that_must_be_called() -> None:
    """In each dialect the arguments come in pieces, and whole, and say what was heard."""
    wanted = {"heard": "hello there", "café": "汉字"}
    message = {"tools": [{"name": "weather", "input_schema": {}}], "tool_choice": {"type": "any"}}
    response = {"tools": [{"type": "function", "name": "weather"}], "tool_choice": "required"}
    async with running_fake() as replica, client_of(replica) as client:
        events = (await events_until_end(replica, **TOOLS))[1:-1]
        whole = (await ask(replica, **TOOLS)).json()["choices"][0]
        block = (await client.post("/v1/messages", json={**MESSAGE, "stream": False, **message})).json()
        item = (await client.post("/v1/responses", json={"input": "hello there", **response})).json()
        streamed = await client.post("/v1/messages", json={**MESSAGE, **message})
        again = await client.post("/v1/responses", json={"input": "hello there", "stream": True, **response})
    calls = [event["choices"][0]["delta"]["tool_calls"][0]["function"] for event in events]
    assert calls[0]["name"] == "weather"
    assert json.loads("".join(call["arguments"] for call in calls)) == wanted
    assert (whole["finish_reason"], whole["message"]["content"]) == ("tool_calls", None)
    assert json.loads(whole["message"]["tool_calls"][0]["function"]["arguments"]) == wanted
    assert (block["stop_reason"], block["content"][0]["input"]) == ("tool_use", wanted)
    assert json.loads(item["output"][0]["arguments"]) == wanted
    assert b'"partial_json":"{\\"hea"' in streamed.content
    assert b"event: response.function_call_arguments.done\n" in again.content


async def test_logprobs() -> None:
    """Asked for, they stand beside each token and beside the whole answer."""
    async with running_fake("--fake-tokens", "2") as replica, client_of(replica) as client:
        events = await events_until_end(replica, logprobs=True)
        whole = (await ask(replica, logprobs=True)).json()["choices"][0]
        text = (await client.post("/v1/completions", json={"prompt": "a", "logprobs": 1})).json()["choices"][0]
    assert [event["choices"][0]["logprobs"]["content"][0]["token"] for event in events[1:-1]] == ["m1", " heard"]
    assert [each["token"] for each in whole["logprobs"]["content"]] == ["m1", " heard"]
    assert text["logprobs"]["text_offset"] == [0, 2]


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/responses"])
async def test_other_dialects_when_the_engine_dies(path: str) -> None:
    """Anthropic's streams end with an error event, those of responses with a broken connection."""
    async with running_fake("--fake-crash-after-requests", "0") as replica, client_of(replica) as client:
        body = {**MESSAGE, "input": "hello"}
        if path == "/v1/messages":
            assert b"event: error\ndata: " in (await client.post(path, json=body)).content
        else:
            with pytest.raises(httpx.RemoteProtocolError):
                await client.post(path, json=body)
