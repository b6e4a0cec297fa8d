"""Limits on the contents of a request, and the engine fields that clients may not set."""

import msgspec

from config.schema import LimitSettings
from gateway.errors import RequestError
from gateway.openai.endpoints import Endpoint
from gateway.openai.fields import FLAG, INTEGER, INTEGER_OR_FLAG, read
from gateway.openai.json_scan import SHORT_BYTES, Fields, Parts, split_array

# Fields of vLLM 0.32's request models (the last line: of older versions) that only the operator may use. They run a
# template from the client (CVE-2025-62426), pass tensors or KV transfers to the engine, change how media are loaded,
# take precedence over other clients, or name state that is shared with them.
GUARDED_FIELDS = frozenset(
    {
        "chat_template",
        *("prompt_embeds", "kv_transfer_params", "ec_transfer_params", "vllm_xargs"),
        *("mm_processor_kwargs", "media_io_kwargs"),
        *("priority", "request_id", "session_id", "cache_salt", "watermarking"),
        *("logits_processors", "guided_decoding_backend"),
    }
)
# Keys of `chat_template_kwargs` that reach the tokenizer instead of the template (PYSEC-2026-4349).
GUARDED_KWARGS = frozenset(
    {
        *("chat_template", "conversation", "messages", "tools", "tokenize", "padding", "truncation", "max_length"),
        *("return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs", "processor_kwargs"),
    }
)

_STRING_OR_ARRAY = msgspec.json.Decoder(str | list[msgspec.Raw] | None)

_COUNTS = frozenset({"n", "best_of", "logprobs", "top_logprobs", "prompt_logprobs"})
_LISTS = frozenset({"messages", "previous_input_messages", "input", "prompt", "tools"})
_STOPS = frozenset({"stop", "stop_sequences"})
_SCALARS = _COUNTS | _STOPS
_BOUNDED = _SCALARS | _LISTS


def check_limits(endpoint: Endpoint, body: bytes, fields: Fields, limits: LimitSettings) -> dict[str, Parts]:
    """Raise RequestError if a field exceeds its limit; returns the arrays that were split for counting, by field."""
    # With fewer commas than a list may have entries, no list needs splitting. In a long body counting does not pay.
    commas = body.count(b",") if len(body) <= SHORT_BYTES else len(body)
    arrays: dict[str, Parts] = {}
    if commas < min(limits.messages, limits.prompts, limits.tools) and _SCALARS.isdisjoint(fields):
        return arrays
    for key in fields.keys() & _BOUNDED:
        if key in _LISTS:
            limit, noun = _entry_limit(endpoint, key, limits)
            if commas >= limit and (parts := _split_list(endpoint, fields, key, limit, noun)) is not None:
                arrays[key] = parts
        elif key in _STOPS:
            _check_stops(fields, key, limits)
        else:
            _check_count(fields, key, limits)
    return arrays


def _check_count(fields: Fields, key: str, limits: LimitSettings) -> None:
    # In chats, `logprobs` is a boolean.
    value = read(fields, key, INTEGER_OR_FLAG if key == "logprobs" else INTEGER)
    if value is None:
        return
    limit = {"best_of": limits.n, "top_logprobs": limits.logprobs}.get(key)
    limit = getattr(limits, key) if limit is None else limit
    if key == "logprobs" and bool(read(fields, "echo", FLAG)):
        # vLLM then returns log probabilities of the prompt as well.
        limit = min(limit, limits.prompt_logprobs)
    if value > limit:
        raise RequestError(f"{key!r} is {format_number(value)}, the limit is {limit}", param=key)
    if value < 0:
        # In vLLM, -1 means the whole vocabulary.
        raise RequestError(f"{key!r} is {format_number(value)}; give a number from 0 to {limit}", param=key)


def format_number(number: int) -> str:
    """Format a client's number for an error message, within 18 digits."""
    return str(number) if abs(number) < 10**18 else "a number of more than 18 digits"


def _check_stops(fields: Fields, key: str, limits: LimitSettings) -> None:
    if len(fields[key]) > limits.stop_bytes:
        raise RequestError(f"{key!r} is longer than {limits.stop_bytes} bytes", param=key)
    stops = read(fields, key, _STRING_OR_ARRAY)
    if isinstance(stops, list) and len(stops) > limits.stop:
        raise RequestError(f"{key!r} has {len(stops)} entries, the limit is {limits.stop}", param=key)


def _entry_limit(endpoint: Endpoint, key: str, limits: LimitSettings) -> tuple[int, str]:
    if key == "tools":
        return limits.tools, "tools"
    if key == endpoint.batch:
        return limits.prompts, "prompts"
    return limits.messages, "messages"


def _split_list(endpoint: Endpoint, fields: Fields, key: str, limit: int, noun: str) -> Parts | None:
    """Split a list into its entries; None if the field is not a list, or is a single prompt as token ids."""
    text = bytes(fields[key])
    if not text.startswith(b"[") or (key == endpoint.batch and _holds_token_ids(text)):
        return None
    try:
        parts = split_array(text, limit)
    except RecursionError as error:
        raise RequestError(f"{key!r} nests too deeply", param=key) from error
    if parts is None:
        raise RequestError(f"{key!r} has too many {noun}, the limit is {limit}", param=key)
    return parts


def _holds_token_ids(text: bytes) -> bool:
    """Whether an array is one prompt as token ids, rather than several prompts."""
    return text[1:65].lstrip()[:1].isdigit()
