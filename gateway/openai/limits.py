"""What one request may ask of an engine: how many, how long; and which of the engine's own fields are out of reach."""

import msgspec

from config.schema import LimitSettings
from gateway.errors import RequestError
from gateway.openai.endpoints import Endpoint
from gateway.openai.fields import read
from gateway.openai.json_scan import SHORT_BYTES, Fields, Parts, split_array

# Fields of vLLM 0.32's request models (and, last, of older ones) that are the operator's to use. They run a template
# of the client's (CVE-2025-62426), hand tensors or transfers to the engine, change how media are loaded, take turns
# from others, or name what is shared with others.
GUARDED_FIELDS = frozenset(
    {
        "chat_template",
        *("prompt_embeds", "kv_transfer_params", "ec_transfer_params", "vllm_xargs"),
        *("mm_processor_kwargs", "media_io_kwargs"),
        *("priority", "request_id", "session_id", "cache_salt", "watermarking"),
        *("logits_processors", "guided_decoding_backend"),
    }
)
# What `chat_template_kwargs` would hand to the tokenizer instead of to the template (PYSEC-2026-4349).
GUARDED_KWARGS = frozenset(
    {
        *("chat_template", "conversation", "messages", "tools", "tokenize", "padding", "truncation", "max_length"),
        *("return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs", "processor_kwargs"),
    }
)

_FLAG = msgspec.json.Decoder(bool | None)
_INTEGER = msgspec.json.Decoder(int | None)
_INTEGER_OR_FLAG = msgspec.json.Decoder(int | bool | None)
_TEXT_OR_ARRAY = msgspec.json.Decoder(str | list[msgspec.Raw] | None)

_COUNTS = frozenset({"n", "best_of", "logprobs", "top_logprobs", "prompt_logprobs"})
_LISTS = frozenset({"messages", "previous_input_messages", "input", "prompt", "tools"})
_STOPS = frozenset({"stop", "stop_sequences"})
_BOUNDED = _COUNTS | _LISTS | _STOPS


def check_limits(endpoint: Endpoint, body: bytes, fields: Fields, limits: LimitSettings) -> dict[str, Parts]:
    """Refuse a request for too much; returns the arrays that had to be taken apart to know."""
    # As many commas as a list may have entries prove it short; in a long body they are not worth counting.
    commas = body.count(b",") if len(body) <= SHORT_BYTES else len(body)
    arrays = {}
    for key in fields.keys() & _BOUNDED:
        if key in _LISTS:
            most, what = _most_entries(endpoint, key, limits)
            if commas >= most and (parts := _entries(endpoint, fields, key, most, what)) is not None:
                arrays[key] = parts
        elif key in _STOPS:
            _check_stops(fields, key, limits)
        else:
            _check_count(fields, key, limits)
    return arrays


def _check_count(fields: Fields, key: str, limits: LimitSettings) -> None:
    # A chat's `logprobs` is true or false.
    asked = read(fields, key, _INTEGER_OR_FLAG if key == "logprobs" else _INTEGER)
    if asked is None:
        return
    most = {"best_of": limits.n, "top_logprobs": limits.logprobs}.get(key)
    most = getattr(limits, key) if most is None else most
    if key == "logprobs" and read(fields, "echo", _FLAG):
        # vLLM then tells those of the prompt as well.
        most = min(most, limits.prompt_logprobs)
    if asked > most:
        raise RequestError(f"{key!r} is {format_number(asked)}, the limit is {most}", param=key)
    if asked < 0:
        # To vLLM, -1 means the whole vocabulary.
        raise RequestError(f"{key!r} is {format_number(asked)}; give a number from 0 to {most}", param=key)


def format_number(number: int) -> str:
    """Write a client's number for a message, unless that would be long."""
    return str(number) if abs(number) < 10**18 else "an immense number"


def _check_stops(fields: Fields, key: str, limits: LimitSettings) -> None:
    if len(fields[key]) > limits.stop_bytes:
        raise RequestError(f"{key!r} is longer than {limits.stop_bytes} bytes", param=key)
    stops = read(fields, key, _TEXT_OR_ARRAY)
    if isinstance(stops, list) and len(stops) > limits.stop:
        raise RequestError(f"{key!r} has {len(stops)} entries, the limit is {limits.stop}", param=key)


def _most_entries(endpoint: Endpoint, key: str, limits: LimitSettings) -> tuple[int, str]:
    if key == "tools":
        return limits.tools, "tools"
    if key == endpoint.batch:
        return limits.prompts, "prompts"
    return limits.messages, "messages"


def _entries(endpoint: Endpoint, fields: Fields, key: str, most: int, what: str) -> Parts | None:
    """The entries of a list; None if it isn't one, or is a single prompt."""
    text = bytes(fields[key])
    if not text.startswith(b"[") or (key == endpoint.batch and _holds_token_ids(text)):
        return None
    try:
        parts = split_array(text, most)
    except RecursionError as error:
        raise RequestError(f"{key!r} nests too deeply", param=key) from error
    if parts is None:
        raise RequestError(f"{key!r} has too many {what}, the limit is {most}", param=key)
    return parts


def _holds_token_ids(text: bytes) -> bool:
    """Tell whether an array is one prompt, given as numbers, rather than several."""
    return text[1:65].lstrip()[:1].isdigit()
