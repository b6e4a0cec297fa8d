"""Which requests an external model can't answer as asked: those with fields that it would not see; pure.

litellm drops parameters that a provider does not have. Those that bound or shape an answer must not be dropped: such a
request is for replicas alone.
"""

from collections.abc import Collection, Iterator
from typing import Any

import msgspec

from gateway.errors import INVALID_JSON
from gateway.openai.endpoints import COMPLETIONS, RESPONSES
from gateway.openai.external_tools import CLIENT_KINDS
from gateway.openai.json_scan import Fields
from gateway.openai.request import InferenceRequest

# Of vLLM: no provider has them.
_OF_VLLM = frozenset(
    {
        *("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "structural_tag"),
        *("min_tokens", "stop_token_ids", "allowed_token_ids", "bad_words", "ignore_eos"),
        *("prompt_logprobs", "return_token_ids"),
    }
)
# Of completions: litellm makes a chat of a completion where a provider has no such endpoint.
_OF_COMPLETIONS = ("echo", "suffix", "best_of")
_COUNTS = frozenset({"n", "best_of"})
_FORMATS = frozenset({"json_object", "json_schema"})
_PASSED = ("stop", "logit_bias", "logprobs", "top_logprobs", "tools", "functions")
LENGTHS = ("max_completion_tokens", "max_tokens")

_ANY: "msgspec.json.Decoder[Any]" = msgspec.json.Decoder()


class _Tool(msgspec.Struct):
    type: str = ""


_TOOLS = msgspec.json.Decoder(list[_Tool])


def unsupported_field(inference: InferenceRequest, parameters: Collection[str] | None) -> str | None:
    """Return a field with which an external model does not answer as asked; None if there is none.

    `parameters` are the parameters of chats that the model has; None if they are not known.
    """
    fields = inference.fields
    for name in _OF_VLLM & fields.keys():
        if _value(fields, name):
            return name
    if inference.endpoint is COMPLETIONS and (of_completions := _of_completions(fields)) is not None:
        return of_completions
    if "tools" in fields and not _are_of_client(fields):
        return "tools"
    if (kind := _format(inference)) is not None and kind not in _FORMATS:
        return "response_format"
    if parameters is None or not inference.endpoint.generates:
        return None
    return next((name for name in _needed(inference) if name not in parameters), _length(inference, parameters))


def _of_completions(fields: Fields) -> str | None:
    """A list of prompts and token ids have no place in a chat."""
    if not bytes(fields.get("prompt", b"")).startswith(b'"'):
        return "prompt"
    return next((name for name in _OF_COMPLETIONS if _is_set(fields, name)), None)


def _are_of_client(fields: Fields) -> bool:
    try:
        return all(tool.type in CLIENT_KINDS for tool in _TOOLS.decode(fields["tools"]))
    except INVALID_JSON:
        return True  # `external_fields` says what is wrong with them


def _format(inference: InferenceRequest) -> str | None:
    """The type of the format that an answer must have; None for plain text."""
    name = "text" if inference.endpoint is RESPONSES else "response_format"
    wanted = _value(inference.fields, name)
    if inference.endpoint is RESPONSES and isinstance(wanted, dict):
        wanted = wanted.get("format")
    kind = wanted.get("type") if isinstance(wanted, dict) else None
    return kind if isinstance(kind, str) and kind != "text" else None


def _needed(inference: InferenceRequest) -> Iterator[str]:
    """The parameters without which an answer would not be what was asked for."""
    fields = inference.fields
    yield from [name for name in ("n", *_PASSED) if _is_set(fields, name)]
    if _format(inference) is not None:
        yield "response_format"
    choice = _value(fields, "tool_choice")
    if choice == "required" or isinstance(choice, dict):
        yield "tool_choice"


def _length(inference: InferenceRequest, parameters: Collection[str]) -> str | None:
    given = [name for name in inference.endpoint.length_keys if _value(inference.fields, name) is not None]
    bounded = given or inference.fill_max_tokens is not None or inference.endpoint.length_default_tokens is not None
    if not bounded or any(name in parameters for name in LENGTHS):
        return None
    return given[0] if given else inference.endpoint.length_keys[0]


def _is_set(fields: Fields, name: str) -> bool:
    value = _value(fields, name)
    return value != 1 if name in _COUNTS and value is not None else bool(value)


def _value(fields: Fields, name: str) -> Any:
    """A value of any type; None if it is missing."""
    try:
        return _ANY.decode(fields[name]) if name in fields else None
    except INVALID_JSON:
        return None
