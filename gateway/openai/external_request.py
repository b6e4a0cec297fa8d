"""What an external model is asked: the fields of a request that providers know, and nothing else.

litellm takes its own options as arguments of the same call, among them `api_base`, `fallbacks` and `mock_response`. So
fields are passed by an allow-list: those of OpenAI's API that concern the answer. Fields of vLLM, and names of users
and sessions, stay here.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import msgspec

from gateway.openai.endpoints import CHAT, COMPLETIONS, EMBEDDINGS
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
    if "messages" in kept and isinstance(kept["messages"], list):
        kept["messages"] = [_without_thoughts(message) for message in kept["messages"]]
    return kept


def _without_thoughts(message: Any) -> Any:
    if not isinstance(message, dict) or message.keys().isdisjoint(_THOUGHTS):
        return message
    return {name: value for name, value in message.items() if name not in _THOUGHTS}
