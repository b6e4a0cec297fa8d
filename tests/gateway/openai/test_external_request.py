"""What a provider gets of a request, and what is refused: parts, tools and shapes."""

import json
from typing import Any

import pytest

from gateway.errors import RequestError
from gateway.openai.endpoints import CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES, Endpoint
from gateway.openai.external_request import external_fields
from tests.gateway.openai.parsing import parse

PDF = "data:application/pdf;base64,JVBERi0xLjQK"
PNG = "data:image/png;base64,AAAA"


def fields_of(endpoint: Endpoint, **fields: Any) -> dict[str, Any]:
    """The fields that a provider gets."""
    return external_fields(parse(json.dumps({"model": "gpt", **fields}), endpoint))


def chat(*parts: Any) -> dict[str, Any]:
    """A chat with these parts."""
    return {"messages": [{"role": "user", "content": list(parts)}]}


def items(*parts: Any) -> dict[str, Any]:
    """The same for `/v1/responses`."""
    return {"input": [{"role": "user", "content": list(parts)}]}


@pytest.mark.parametrize(
    "endpoint, fields",
    [
        (CHAT, chat({"type": "file", "file": {"file_id": "gs://bucket/x.pdf"}})),
        (CHAT, chat({"type": "file", "file": {"file_id": "file-abc", "file_data": PDF}})),
        (CHAT, chat({"type": "file", "file": {"file_data": "http://10.0.0.1/x"}})),
        (CHAT, chat({"type": "file", "file": {"file_data": "data:x;gs://bucket/x.pdf"}})),
        (CHAT, chat({"type": "document", "source": {"type": "file", "file_id": "file-abc"}})),
        (CHAT, chat({"type": "container_upload", "file_id": "file-abc"})),
        (CHAT, chat({"type": "input_audio", "input_audio": {"data": "gs://bucket/x.wav", "format": "wav"}})),
        (CHAT, chat({"type": "input_file", "file_id": "file-abc"})),
        (CHAT, chat({"type": ["file"]})),
        (RESPONSES, items({"type": "input_file", "file_id": "file-abc"})),
        (RESPONSES, items({"type": "input_file", "file_data": "http://10.0.0.1/x"})),
        (RESPONSES, items({"type": "input_image", "file_id": "file-abc"})),
        (RESPONSES, {"input": [{"type": "item_reference", "id": "msg_1"}]}),
        (EMBEDDINGS, {"input": "gs://bucket/x.png"}),
        (EMBEDDINGS, {"input": ["a", "s3://bucket/x.png"]}),
        (EMBEDDINGS, {"input": ["files/abc"]}),
    ],
)
def test_a_reference_is_refused(endpoint: Endpoint, fields: dict[str, Any]) -> None:
    """Whatever the provider would read with the operator's credentials."""
    with pytest.raises(RequestError) as raised:
        fields_of(endpoint, **fields)
    assert raised.value.status == 400


@pytest.mark.parametrize(
    "endpoint, fields",
    [
        (CHAT, {"messages": ["hi"]}),
        (CHAT, {"messages": "hi"}),
        (CHAT, {}),
        (CHAT, {"messages": [{"content": "hi"}]}),
        (CHAT, {"messages": [{"role": "user", "content": 5}]}),
        (CHAT, {"messages": [{"role": "user", "content": ["hi"]}]}),
        (CHAT, {"messages": [{"role": "assistant", "tool_calls": "x"}]}),
        (CHAT, chat({"type": "image_url", "image_url": 5})),
        (RESPONSES, {"input": 5}),
        (RESPONSES, {"input": [{"content": "hi"}]}),
        (EMBEDDINGS, {"input": [{"image": "x"}]}),
    ],
)
def test_a_shape_that_no_provider_takes(endpoint: Endpoint, fields: dict[str, Any]) -> None:
    """It is the client's error, found before anything is sent."""
    with pytest.raises(RequestError):
        fields_of(endpoint, **fields)


def test_what_passes() -> None:
    """Known parts with known keys."""
    image = {"type": "image_url", "image_url": {"url": PNG, "detail": "low"}}
    file = {"type": "file", "file": {"file_data": PDF, "filename": "x.pdf"}}
    audio = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}
    parts: list[dict[str, Any]] = [{"type": "text", "text": "see"}, image, file, audio]
    assert fields_of(CHAT, **chat({**parts[0], "unknown": 1}, *parts[1:]))["messages"][0]["content"] == parts
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    turns = [
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning": "hm", "thinking_blocks": [1]},
        {"role": "tool", "tool_call_id": "c", "content": "rain"},
    ]
    kept = {"role": "assistant", "content": None, "tool_calls": [call]}
    assert fields_of(CHAT, messages=turns)["messages"] == [kept, turns[1]]
    assert fields_of(RESPONSES, input="hi")["input"] == "hi"
    given = items({"type": "input_text", "text": "a"}, {"type": "input_image", "image_url": PNG})
    output = {"type": "function_call_output", "call_id": "c", "output": "rain"}
    thought = {"type": "reasoning", "summary": []}
    kept_items = fields_of(RESPONSES, input=[*given["input"], thought, output])["input"]
    assert kept_items == [*given["input"], output]
    assert fields_of(EMBEDDINGS, input=["a", "https://example.com"])["input"] == ["a", "https://example.com"]


FUNCTION = {"name": "f", "description": "d", "parameters": {"type": "object"}, "strict": True}


def with_tools(endpoint: Endpoint, **fields: Any) -> dict[str, Any]:
    """A request with tools, or with what belongs to them."""
    prompt = {"input": "hi"} if endpoint is RESPONSES else {"messages": [{"role": "user", "content": "hi"}]}
    return fields_of(endpoint, **prompt, **fields)


@pytest.mark.parametrize(
    "endpoint, fields",
    [
        (RESPONSES, {"tools": [{"type": "file_search", "vector_store_ids": ["vs_1"]}]}),
        (RESPONSES, {"tools": [{"type": "mcp", "server_url": "litellm_proxy"}]}),
        (RESPONSES, {"tools": [{"type": "function", **FUNCTION}, {"type": "web_search"}]}),
        (RESPONSES, {"tool_choice": {"type": "file_search"}}),
        (RESPONSES, {"tool_choice": {"type": "mcp", "server_label": "x"}}),
        (CHAT, {"tools": [{"type": "mcp", "server_url": "litellm_proxy"}]}),
        (CHAT, {"tools": [{"type": "function", "googleSearch": {}}]}),
        (CHAT, {"tools": [{"googleSearch": {}}]}),
        (CHAT, {"tools": ["f"]}),
        (CHAT, {"tool_choice": {"type": "web_search"}}),
        (CHAT, {"tool_choice": "web_search"}),
        (CHAT, {"functions": [{"googleSearch": {}}]}),
        (CHAT, {"function_call": {"type": "web_search"}}),
        (CHAT, {"function_call": [1]}),
    ],
)
def test_tools_of_the_provider_are_refused(endpoint: Endpoint, fields: dict[str, Any]) -> None:
    """They read with the operator's credentials, or cost what nothing counts."""
    with pytest.raises(RequestError):
        with_tools(endpoint, **fields)


def test_tools_of_the_client() -> None:
    """They pass, with known keys alone."""
    tool = {"type": "function", "function": FUNCTION}
    sent = with_tools(CHAT, tools=[{**tool, "googleSearch": {}}], tool_choice="auto")
    assert (sent["tools"], sent["tool_choice"]) == ([tool], "auto")
    chosen = {"type": "function", "function": {"name": "f"}}
    assert with_tools(CHAT, tools=[tool], tool_choice=chosen)["tool_choice"] == chosen
    custom = {"type": "custom", "custom": {"name": "g", "description": "d"}}
    assert with_tools(CHAT, tools=[custom])["tools"] == [custom]
    flat = {"type": "function", **FUNCTION}
    sent = with_tools(RESPONSES, tools=[flat], tool_choice={"type": "function", "name": "f"})
    assert (sent["tools"], sent["tool_choice"]) == ([flat], {"type": "function", "name": "f"})
    older = with_tools(CHAT, functions=[FUNCTION], function_call={"name": "f"})
    assert older["functions"] == [{key: FUNCTION[key] for key in ("name", "description", "parameters")}]
    assert older["function_call"] == {"name": "f"}


@pytest.mark.parametrize(
    "endpoint, fields, key_limit, sent",
    [
        (COMPLETIONS, {"prompt": "hi"}, 100, {"max_tokens": 16}),
        (COMPLETIONS, {"prompt": "hi"}, None, {"max_tokens": 16}),
        (COMPLETIONS, {"prompt": "hi"}, 10, {"max_tokens": 10}),
        (COMPLETIONS, {"prompt": "hi", "max_tokens": 50}, 100, {"max_tokens": 50}),
        (CHAT, {"messages": []}, 100, {"max_completion_tokens": 100}),
        (CHAT, {"messages": []}, None, {}),
    ],
)
def test_the_completion_length(
    endpoint: Endpoint, fields: dict[str, Any], key_limit: int | None, sent: dict[str, int]
) -> None:
    """It is always sent where vLLM has a default: a provider may have none."""
    inference = parse(json.dumps({"model": "gpt", **fields}), endpoint, max_tokens=key_limit)
    assert {key: value for key, value in external_fields(inference).items() if "max_" in key} == sent


@pytest.mark.parametrize("length", [0, -1, "5", 1.5, [1]])
def test_a_length_that_is_none(length: Any) -> None:
    """A provider may take it for no limit at all."""
    with pytest.raises(RequestError):
        fields_of(COMPLETIONS, prompt="hi", max_tokens=length)
