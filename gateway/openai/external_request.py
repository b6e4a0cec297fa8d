"""What an external model is asked: the fields of a request that providers know, and nothing else.

litellm takes its own options as arguments of the same call, among them `api_base`, `fallbacks` and `mock_response`. So
fields are passed by an allow-list: those of OpenAI's API that concern the answer. Fields of vLLM, and names of users
and sessions, stay here.
"""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import msgspec

from gateway.openai.endpoints import CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES, Endpoint
from gateway.openai.external_content import chat_messages, embedding_input, response_input
from gateway.openai.external_shapes import refused
from gateway.openai.external_support import LENGTHS
from gateway.openai.external_tools import client_function_call, client_functions, client_tool_choice, client_tools
from gateway.openai.request import InferenceRequest

_SAMPLING = (
    *("temperature", "top_p", "n", "stop", "seed", "max_tokens", "presence_penalty", "frequency_penalty"),
    *("logit_bias", "logprobs", "stream_options"),
)
FIELDS: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        CHAT.name: frozenset(
            {
                *_SAMPLING,
                *("messages", "max_completion_tokens", "top_logprobs", "response_format", "reasoning_effort"),
                *("tools", "tool_choice", "parallel_tool_calls", "functions", "function_call", "verbosity"),
                *("modalities", "audio", "prediction"),
            }
        ),
        COMPLETIONS.name: frozenset({*_SAMPLING, "prompt", "suffix", "echo", "best_of"}),
        RESPONSES.name: frozenset(
            {
                *("input", "instructions", "max_output_tokens", "temperature", "top_p", "text", "reasoning"),
                *("tools", "tool_choice", "parallel_tool_calls", "store"),
            }
        ),
        EMBEDDINGS.name: frozenset({"input", "dimensions", "encoding_format"}),
    }
)
# How fields are checked and copied, by endpoint; the others are values without references.
_COPIES: Mapping[str, Mapping[str, Callable[[Any], Any]]] = MappingProxyType(
    {
        CHAT.name: {
            "messages": chat_messages,
            "tools": partial(client_tools, nested=True),
            "tool_choice": partial(client_tool_choice, nested=True),
            "functions": client_functions,
            "function_call": client_function_call,
        },
        COMPLETIONS.name: {},
        RESPONSES.name: {
            "input": response_input,
            "tools": partial(client_tools, nested=False),
            "tool_choice": partial(client_tool_choice, nested=False),
        },
        EMBEDDINGS.name: {"input": embedding_input},
    }
)
_REQUIRED = frozenset({"messages", "input"})

_OBJECT = msgspec.json.Decoder(dict[str, Any])


def external_fields(inference: InferenceRequest) -> dict[str, Any]:
    """Decode what a provider gets of a request; RequestError for what it must not get, or what has no such shape.

    Thoughts of one model are no input of another: they are left out.
    """
    known = FIELDS[inference.endpoint.name]
    fields = _OBJECT.decode(inference.body_for(""))
    kept = {name: value for name, value in fields.items() if name in known and value is not None}
    for name, copy in _COPIES[inference.endpoint.name].items():
        if name in kept or name in _REQUIRED:
            kept[name] = copy(kept.get(name))
    kept.pop("stream_options", None)
    if inference.stream and inference.endpoint.takes_stream_options:
        kept["stream_options"] = {"include_usage": True}
    return {**kept, **_lengths(inference.endpoint, kept)}


def _lengths(endpoint: Endpoint, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Check the completion length, and state vLLM's default: providers have others, a key's `max_tokens` goes by it."""
    given = {key: fields[key] for key in endpoint.length_keys if key in fields}
    for key, length in given.items():
        if not isinstance(length, int) or length < 1:
            raise refused(key, "it is not a number of tokens", "send a positive integer")
    if given or endpoint.length_default_tokens is None:
        return given
    return {endpoint.length_keys[0]: endpoint.length_default_tokens}


def with_length_parameter(fields: dict[str, Any], parameters: Collection[str] | None) -> dict[str, Any]:
    """Call the completion length of a chat as the model does: litellm would drop it under another name."""
    name, other = LENGTHS
    if parameters is None or name not in fields or name in parameters:
        return fields
    return {other: fields[name], **{key: value for key, value in fields.items() if key not in LENGTHS}}
