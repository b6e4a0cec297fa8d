"""What clients may ask of a model: an allow-list, and how each of its endpoints differs from the others."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One inference endpoint, the same path here and at a replica.

    `length_keys` limit how long an answer gets, the first that is given counts; without one vLLM takes
    `length_default_tokens`, None for as long as the context allows. `batch` is
    the key that may hold several prompts. `prompt_keys` hold what the model reads, in the order in which chat templates
    write it, `turns_key` is the one of them that holds a conversation's turns.
    """

    name: str
    path: str
    errors: Literal["openai", "anthropic"] = "openai"
    # Its answer is text out of a model, token by token: it may be streamed, is metered, and may spill to another rung.
    generates: bool = False
    takes_stream_options: bool = False
    rewrites_reasoning: bool = False
    # It can go on from an earlier answer, if that has been kept.
    keeps_answers: bool = False
    length_keys: tuple[str, ...] = ()
    length_default_tokens: int | None = None
    batch: str | None = None
    prompt_keys: tuple[str, ...] = ()
    turns_key: str | None = None


CHAT = Endpoint(
    "chat.completions",
    "/v1/chat/completions",
    generates=True,
    takes_stream_options=True,
    rewrites_reasoning=True,
    length_keys=("max_completion_tokens", "max_tokens"),
    prompt_keys=("tools", "messages"),
    turns_key="messages",
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
)
EMBEDDINGS = Endpoint("embeddings", "/v1/embeddings", batch="input", prompt_keys=("input", "messages"))
RESPONSES = Endpoint(
    "responses",
    "/v1/responses",
    generates=True,
    keeps_answers=True,
    length_keys=("max_output_tokens",),
    prompt_keys=("tools", "instructions", "input"),
    turns_key="input",
)
MESSAGES = Endpoint(
    "messages",
    "/v1/messages",
    "anthropic",
    generates=True,
    length_keys=("max_tokens",),
    prompt_keys=("tools", "system", "messages"),
    turns_key="messages",
)
COUNT_TOKENS = Endpoint("messages.count_tokens", "/v1/messages/count_tokens", "anthropic")
TOKENIZE = Endpoint("tokenize", "/tokenize")
DETOKENIZE = Endpoint("detokenize", "/detokenize")

ENDPOINTS: Mapping[str, Endpoint] = MappingProxyType(
    {
        each.name: each
        for each in (CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES, MESSAGES, COUNT_TOKENS, TOKENIZE, DETOKENIZE)
    }
)
