"""Inference endpoints: an allow-list of paths, with the fields and formats in which they differ."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One inference endpoint; the gateway and its replicas serve it under the same path.

    `length_keys` are the request fields that limit the completion length, in order of precedence. Without any, vLLM
    generates up to `length_default_tokens`, or to the end of the context if that is None. `batch` is the field that may
    hold several prompts. `prompt_keys` are the fields that the model reads, in the order in which chat templates render
    them; `turns_key` is the one of them that holds the turns of a conversation. The chat template renders the prompt of
    a request that has the field `chat_key`; vLLM then passes its `chat_template_kwargs` to the template.
    """

    name: str
    path: str
    errors: Literal["openai", "anthropic"] = "openai"
    # The response is generated token by token: it can be streamed, is metered, and the request can spill.
    generates: bool = False
    takes_stream_options: bool = False
    rewrites_reasoning: bool = False
    # The API is stateful: responses can be stored and continued. The gateway makes it stateless.
    keeps_answers: bool = False
    length_keys: tuple[str, ...] = ()
    length_default_tokens: int | None = None
    batch: str | None = None
    prompt_keys: tuple[str, ...] = ()
    turns_key: str | None = None
    chat_key: str | None = None
    # The answer may call tools of the client.
    calls_tools: bool = False
    # External models answer it, too.
    external: bool = False
    # The values of `encoding_format` with which a response is JSON; others are bytes, which the gateway does not relay.
    json_encodings: tuple[str, ...] = ()


CHAT = Endpoint(
    "chat.completions",
    "/v1/chat/completions",
    generates=True,
    takes_stream_options=True,
    rewrites_reasoning=True,
    length_keys=("max_completion_tokens", "max_tokens"),
    prompt_keys=("tools", "messages"),
    turns_key="messages",
    chat_key="messages",
    calls_tools=True,
    external=True,
)
COMPLETIONS = Endpoint(
    "completions",
    "/v1/completions",
    generates=True,
    takes_stream_options=True,
    length_keys=("max_tokens",),
    length_default_tokens=16,
    batch="prompt",
    prompt_keys=("prompt",),
    external=True,
)
EMBEDDINGS = Endpoint(
    "embeddings",
    "/v1/embeddings",
    batch="input",
    prompt_keys=("input", "messages"),
    json_encodings=("float", "base64"),
    external=True,
)
RESPONSES = Endpoint(
    "responses",
    "/v1/responses",
    generates=True,
    keeps_answers=True,
    length_keys=("max_output_tokens",),
    prompt_keys=("tools", "instructions", "input"),
    turns_key="input",
    chat_key="input",
    calls_tools=True,
    external=True,
)
MESSAGES = Endpoint(
    "messages",
    "/v1/messages",
    "anthropic",
    generates=True,
    length_keys=("max_tokens",),
    prompt_keys=("tools", "system", "messages"),
    turns_key="messages",
    chat_key="messages",
    calls_tools=True,
)
# vLLM refuses to count tokens of tools that it could not call.
COUNT_TOKENS = Endpoint(
    "messages.count_tokens", "/v1/messages/count_tokens", "anthropic", chat_key="messages", calls_tools=True
)
TOKENIZE = Endpoint("tokenize", "/tokenize", chat_key="messages")
DETOKENIZE = Endpoint("detokenize", "/detokenize")


def expects_anthropic_errors(path: str) -> bool:
    """Whether who asks for a path reads errors in Anthropic's shape, also if there is no such endpoint."""
    return path == MESSAGES.path or path.startswith(f"{MESSAGES.path}/")


ENDPOINTS: Mapping[str, Endpoint] = MappingProxyType(
    {
        endpoint.name: endpoint
        for endpoint in (CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES, MESSAGES, COUNT_TOKENS, TOKENIZE, DETOKENIZE)
    }
)
