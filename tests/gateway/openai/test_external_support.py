"""Which requests an external model can't answer as asked."""

import json
from typing import Any

import pytest

from gateway.openai.endpoints import CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES, Endpoint
from gateway.openai.external_request import external_fields, with_length_parameter
from gateway.openai.external_support import unsupported_field
from tests.gateway.openai.parsing import parse

CLAUDE = frozenset({"max_tokens", "stop", "response_format", "tools", "tool_choice"})
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}
TOOLS = [{"type": "function", "function": {"name": "f"}}]


@pytest.mark.parametrize(
    "endpoint, fields, expected",
    [
        (CHAT, {}, None),
        (CHAT, {"temperature": 0.5, "seed": 1, "top_k": 5, "n": 1, "logprobs": False, "min_tokens": 0}, None),
        (CHAT, {"stop": "x", "response_format": JSON_SCHEMA, "tools": TOOLS, "tool_choice": "required"}, None),
        (CHAT, {"n": 2}, "n"),
        (CHAT, {"logprobs": True}, "logprobs"),
        (CHAT, {"logit_bias": {"5": 1}}, "logit_bias"),
        (CHAT, {"structured_outputs": {"json": {}}}, "structured_outputs"),
        (CHAT, {"guided_json": {"type": "object"}}, "guided_json"),
        (CHAT, {"min_tokens": 5}, "min_tokens"),
        (CHAT, {"stop_token_ids": [1]}, "stop_token_ids"),
        (CHAT, {"response_format": {"type": "structural_tag"}}, "response_format"),
        (CHAT, {"response_format": {"type": "text"}}, None),
        (CHAT, {"tools": [{"type": "web_search"}]}, "tools"),
        (COMPLETIONS, {"prompt": "a"}, None),
        (COMPLETIONS, {"prompt": ["a", "b"]}, "prompt"),
        (COMPLETIONS, {"prompt": [1, 2]}, "prompt"),
        (COMPLETIONS, {"prompt": "a", "echo": True}, "echo"),
        (COMPLETIONS, {"prompt": "a", "best_of": 2}, "best_of"),
        (RESPONSES, {"text": {"format": {"type": "json_schema", "name": "x", "schema": {}}}}, None),
        (RESPONSES, {"tools": [{"type": "file_search"}]}, "tools"),
        (EMBEDDINGS, {"input": ["a", "b"]}, None),
    ],
)
def test_a_model_with_few_parameters(endpoint: Endpoint, fields: dict[str, Any], expected: str | None) -> None:
    """What would be dropped, and bounds or shapes an answer, is for replicas."""
    assert unsupported_field(parse(json.dumps({"model": "m", **fields}), endpoint), CLAUDE) == expected


@pytest.mark.parametrize(
    "endpoint, fields, parameters, expected",
    [
        (CHAT, {"stop": "x"}, {"max_tokens"}, "stop"),
        (CHAT, {"response_format": JSON_SCHEMA}, {"max_tokens"}, "response_format"),
        (CHAT, {"tools": TOOLS}, {"max_tokens"}, "tools"),
        (CHAT, {"max_tokens": 5}, {"stop"}, "max_tokens"),
        (COMPLETIONS, {"prompt": "a"}, {"stop"}, "max_tokens"),
        (RESPONSES, {"text": {"format": JSON_SCHEMA}}, {"max_tokens"}, "response_format"),
        (CHAT, {"n": 2, "stop": "x", "logprobs": True}, None, None),
        (CHAT, {"n": 2, "min_tokens": 5}, None, "min_tokens"),
    ],
)
def test_other_models(
    endpoint: Endpoint, fields: dict[str, Any], parameters: set[str] | None, expected: str | None
) -> None:
    """Of a model whose parameters are not known, only those are told that no provider has."""
    assert unsupported_field(parse(json.dumps({"model": "m", **fields}), endpoint), parameters) == expected


def test_what_is_sent_of_options() -> None:
    """Usage at the end of a stream, and the completion length by the name that the model has for it."""
    body = {"model": "m", "messages": [], "stream": True, "stream_options": {"include_obfuscation": True}}
    assert external_fields(parse(json.dumps(body)))["stream_options"] == {"include_usage": True}
    assert "stream_options" not in external_fields(parse(json.dumps({**body, "stream": False})))
    length = {"messages": [], "max_completion_tokens": 5}
    assert with_length_parameter(length, CLAUDE) == {"messages": [], "max_tokens": 5}
    assert with_length_parameter(length, None) == length
    assert with_length_parameter(length, {"max_completion_tokens"}) == length
