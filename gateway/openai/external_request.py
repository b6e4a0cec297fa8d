"""What an external model is asked: the fields of a request that providers know, and nothing else.

litellm takes its own options as arguments of the same call, among them `api_base`, `fallbacks` and `mock_response`. So
fields are passed by an allow-list: those of OpenAI's API that concern the answer. Fields of vLLM, and names of users
and sessions, stay here.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import msgspec

from gateway.openai.endpoints import CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES
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
# Thoughts of one model are no input of another.
_THOUGHTS = ("reasoning", "reasoning_content")

_OBJECT = msgspec.json.Decoder(dict[str, Any])


def external_fields(inference: InferenceRequest) -> dict[str, Any]:
    """Decode what a provider gets of a request."""
    known = FIELDS[inference.endpoint.name]
    fields = _OBJECT.decode(inference.body_for(""))
    kept = {name: value for name, value in fields.items() if name in known and value is not None}
    for name in ("messages", "input"):
        if isinstance(turns := kept.get(name), list):
            kept[name] = [_without_thoughts(turn) for turn in turns if not _is_thought(turn)]
    return kept


def _is_thought(item: Any) -> bool:
    """Whether an item of `/v1/responses` is reasoning of an earlier turn."""
    return isinstance(item, dict) and item.get("type") == "reasoning"


def _without_thoughts(message: Any) -> Any:
    if not isinstance(message, dict) or message.keys().isdisjoint(_THOUGHTS):
        return message
    return {name: value for name, value in message.items() if name not in _THOUGHTS}
