"""From a request to what is asked: vLLM's checks with vLLM's words, a chat template, and tokens that are characters."""

import json
import re
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any, Literal

from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import TypeAdapter, ValidationError

from config.golden import Golden
from tests.fakes.distributions import prompt_logprobs
from tests.fakes.http_server import Request
from tests.fakes.options import Options

Kind = Literal["chat", "text", "messages", "responses"]
ID_PREFIXES: dict[Kind, str] = {"chat": "chatcmpl", "messages": "chatcmpl", "text": "cmpl"}
# The length of the pieces in which the arguments of a tool call arrive, in characters.
PIECE_CHARACTERS = 5
# Behind the last character that there is.
THINK_TOKENS = {"<think>": 0x110000, "</think>": 0x110001}
FILLER = (" one", " é", " 汉", " two")
_INTEGER: TypeAdapter[int | None] = TypeAdapter(int | None)


class ApiError(Exception):
    """An answer in vLLM's error shape."""

    def __init__(self, status: int, kind: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": status}}


@dataclass(frozen=True, slots=True)
class Ask:
    """One generation: what to say, in how many steps, and in which shape."""

    kind: Kind
    id: str
    created: int
    model: str
    prompt_tokens: int
    choices: tuple[tuple[str, ...], ...]  # the tokens of each choice, all of the same number
    steps: int
    reasoning_steps: int
    finish_reason: str
    stream: bool
    include_usage: bool
    continuous_usage: bool
    fingerprint: str | None
    prompt_logprobs: list[dict[str, Any] | None] | None
    token_ids: list[int] | None
    logprobs: bool
    tool: str | None  # called instead of saying something; the tokens are pieces of its arguments
    body: Mapping[str, Any]  # what was asked, for dialects that repeat it


def read_json(request: Request) -> dict[str, Any]:
    """The JSON object in the body, or the 400 that vLLM gives."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        message = "1 validation error:\n  Unsupported Media Type: Only 'application/json' is allowed"
        raise ApiError(400, "Bad Request", message)
    try:
        body = json.loads(request.body)
    except ValueError as error:
        at = error.pos if isinstance(error, json.JSONDecodeError) else 0
        raise _invalid("json_invalid", f"body.{at}", "JSON decode error") from None
    if not isinstance(body, dict):
        raise _invalid("model_attributes_type", "body", "Input should be a valid dictionary")
    return body


def check_model(body: Mapping[str, Any], options: Options) -> None:
    """Any served name will do, and so does none at all."""
    if (name := body.get("model")) and name not in (*options.served, *options.adapters):
        message = f"The model `{name}` does not exist. Valid aliases: {', '.join(options.served)}."
        raise ApiError(404, "NotFoundError", message, "model")


def check_tools(body: Mapping[str, Any], options: Options) -> None:
    """Without a parser for calls vLLM refuses tools; /v1/responses and /tokenize don't look."""
    if body.get("tools") and body.get("tool_choice") not in ("none", {"type": "none"}) and not options.auto_tools:
        message = '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set'
        raise ApiError(400, "BadRequestError", message)


def read_ask(kind: Kind, request: Request, options: Options) -> Ask:
    """Check a generation request in the order vLLM does: its shape, its model, its length."""
    asked = read_json(request)
    body = _as_chat(kind, asked)
    prompts = _text_prompts(body) if kind == "text" else [chat_prompt(body, options)]
    heard = prompts if kind == "text" else [last_words(body)]
    # The legacy endpoint has OpenAI's old default; chat goes on until the model stops.
    default_limit = 16 if kind == "text" else None
    limit = _integer(body, "max_completion_tokens") or _integer(body, "max_tokens") or default_limit
    width = _integer(body, "n") or 1
    asked_usage = _stream_options(body)
    check_model(body, options)
    if kind in ("chat", "messages"):
        check_tools(asked, options)
    prompt_tokens = sum(map(len, prompts))
    _check_length(max(map(len, prompts)), limit, options)
    steps, finish_reason = _steps(limit, options, ignore_eos=bool(body.get("ignore_eos")))
    choices = tuple(_say(options.served[0], heard[i // width], i % width, steps) for i in range(len(prompts) * width))
    tool = forced_tool(asked)
    if tool:
        choices = (_arguments(heard[0]),) * len(choices)
        steps, finish_reason = len(choices[0]), "tool_calls"
    return Ask(
        kind=kind,
        id=_id(kind, request),
        created=int(time.time()),
        model=name if (name := body.get("model")) in options.adapters else options.served[0],
        prompt_tokens=prompt_tokens,
        choices=choices,
        steps=steps,
        reasoning_steps=0 if kind == "text" or tool else min(options.faults.reasoning_tokens, steps),
        finish_reason=finish_reason,
        stream=bool(body.get("stream")),
        include_usage=options.force_usage or bool(asked_usage.get("include_usage")),
        continuous_usage=options.force_usage or bool(asked_usage.get("continuous_usage_stats")),
        fingerprint=options.fingerprint,
        prompt_logprobs=_prompt_logprobs(body, options),
        token_ids=_token_ids(body, steps, finish_reason),
        logprobs=body.get("logprobs") not in (None, False),
        tool=tool,
        body=asked,
    )


def forced_tool(body: Mapping[str, Any]) -> str | None:
    """Name the tool that must be called, in any of the three ways of saying so; a fake calls no other."""
    choice = body.get("tool_choice")
    tools = body.get("tools") or []
    names = [tool.get("name") or tool.get("function", {}).get("name") for tool in tools]
    if isinstance(choice, dict):
        wanted = choice.get("name") or choice.get("function", {}).get("name")
        return wanted or (names[0] if names and choice.get("type") == "any" else None)
    return names[0] if names and choice == "required" else None


def chat_prompt(body: Mapping[str, Any], options: Options) -> str:
    """Messages in ChatML, or in the template on the command line; the built-in one may inject an open `<think>`."""
    kwargs = {**(body.get("chat_template_kwargs") or {})}
    asks = body.get("add_generation_prompt", True)
    if options.chat_template is not None:
        return rendered(options.chat_template, _messages(body), add_generation_prompt=asks, **kwargs)
    turns = [f"<|im_start|>{each.get('role')}\n{_content(each)}<|im_end|>\n" for each in _messages(body)]
    if asks:
        off = options.faults.think_prefix and kwargs.get("enable_thinking") is False
        thought = "<think>\n" if options.faults.think_prefix else ""
        turns.append("<|im_start|>assistant\n" + thought + ("\n</think>\n\n" if off else ""))
    return "".join(turns)


def rendered(template: Path, messages: list[dict[str, Any]], **kwargs: Any) -> str:
    """A chat in a template of its own."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template.read_text(encoding="utf-8")).render(messages=messages, **kwargs)


def last_words(body: Mapping[str, Any]) -> str:
    """The text of the last message."""
    messages = _messages(body)
    return _content(messages[-1]) if messages else ""


def tokenize(text: str, *, think_tokens: bool = False) -> list[int]:
    """One token per character: every fake can detokenize another's tokens. Tags may be tokens, too."""
    words = re.findall("<think>|</think>|.", text, re.DOTALL) if think_tokens else text
    return [THINK_TOKENS.get(word) or ord(word) for word in words]


def detokenize(tokens: list[int]) -> str:
    """The inverse of `tokenize`."""
    words = {token: word for word, token in THINK_TOKENS.items()}
    return "".join(words.get(token) or chr(token) for token in tokens)


def _prompt_logprobs(body: Mapping[str, Any], options: Options) -> list[dict[str, Any] | None] | None:
    """What this model says of a prompt's tokens: its known distribution, its directory's golden prompt, or -1."""
    tokens, top, faults = body.get("prompt"), body.get("prompt_logprobs"), options.faults
    if top is None or not isinstance(tokens, list) or faults.no_prompt_logprobs:
        return None
    if top > options.max_logprobs:
        allowed = options.max_logprobs
        message = f"Requested prompt logprobs of {top}, which is greater than max allowed: {allowed}"
        raise ApiError(400, "BadRequestError", message, "prompt_logprobs")
    if faults.vocabulary:
        return prompt_logprobs(tokens, top, faults.vocabulary, faults.noise)
    golden = Golden.read(Path(options.model))
    known = golden.variant if golden and list(golden.ids) == tokens else (-1.0,) * (len(tokens) - 1)
    shift = faults.logprob_shift
    return [
        None,
        *(
            {str(token): {"logprob": logprob + shift, "rank": 1, "decoded_token": detokenize([token])}}
            for token, logprob in zip(tokens[1:], known, strict=True)
        ),
    ]


def _token_ids(body: Mapping[str, Any], steps: int, finish_reason: str) -> list[int] | None:
    """Tokens of the first choice, which follow the seed; one that stops ends with a token that it was to stop at."""
    if not body.get("return_token_ids"):
        return None
    ends = body.get("stop_token_ids") or []
    first = int(body.get("seed") or 0) % 50
    tokens = [100 + (first + step) % 50 for step in range(steps)]
    return [*tokens[:-1], ends[0]] if ends and finish_reason == "stop" else tokens


def _as_chat(kind: Kind, body: dict[str, Any]) -> dict[str, Any]:
    """Say in the words of a chat what another dialect asks for."""
    if kind == "messages":
        if not isinstance(body.get("max_tokens"), int):
            raise _invalid("missing", "body.max_tokens", "Field required")
        system = [{"role": "system", "content": body["system"]}] if body.get("system") else []
        said = _messages(body)
    elif kind == "responses":
        system = [{"role": "system", "content": body["instructions"]}] if body.get("instructions") else []
        given = body.get("input")
        if not isinstance(given, str | list):
            raise _invalid("missing", "body.input", "Field required")
        said = [{"role": "user", "content": given}] if isinstance(given, str) else given
    else:
        return body
    limit = body.get("max_output_tokens") if kind == "responses" else body.get("max_tokens")
    return {**body, "messages": [*system, *said], "max_tokens": limit}


def _id(kind: Kind, request: Request) -> str:
    if kind == "responses":
        return f"resp_{uuid.uuid4().hex[:16]}"
    return f"{ID_PREFIXES[kind]}-{request.headers.get('x-request-id') or uuid.uuid4().hex}"


def _arguments(heard: str) -> tuple[str, ...]:
    """What a tool is called with, in pieces."""
    text = json.dumps({"heard": heard, "café": "汉字"}, ensure_ascii=False)
    return tuple(text[start : start + PIECE_CHARACTERS] for start in range(0, len(text), PIECE_CHARACTERS))


def _say(model: str, heard: str, choice: int, steps: int) -> tuple[str, ...]:
    """Who speaks, what was heard, characters of two and three bytes, and then filler."""
    name = model if choice == 0 else f"{model}#{choice}"
    opening = [name, " heard", *(f" {word}" for word in heard.split()[:6]), " café", " 汉字"]
    return tuple(islice(chain(opening, cycle(FILLER)), steps))


def _steps(limit: int | None, options: Options, *, ignore_eos: bool) -> tuple[int, str]:
    natural = options.faults.tokens
    if limit is not None and (limit < natural or ignore_eos):
        return limit, "length"
    return natural, "stop"


def _check_length(prompt_tokens: int, limit: int | None, options: Options) -> None:
    if limit is not None and limit > options.max_model_len:
        message = f"max_tokens={limit} cannot be greater than max_model_len={options.max_model_len}."
        raise ApiError(400, "BadRequestError", message, "max_tokens")
    if prompt_tokens >= options.max_model_len:
        message = (
            f"This model's maximum context length is {options.max_model_len} tokens. However, your prompt contains "
            f"at least {options.max_model_len} input tokens, which exceeds this limit even without any output tokens. "
            "Please reduce the length of the input prompt."
        )
        raise ApiError(400, "BadRequestError", message, "input_tokens")


def _messages(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    messages = body.get("messages")
    if messages is None:
        raise _invalid("missing", "body.messages", "Field required")
    if not isinstance(messages, list) or not all(isinstance(each, dict) for each in messages):
        raise _invalid("list_type", "body.messages", "Input should be a valid list")
    return messages


def _content(message: Mapping[str, Any]) -> str:
    """Text, whether it comes as a string or as parts."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def _text_prompts(body: Mapping[str, Any]) -> list[str]:
    """One prompt or several, each as text or as tokens."""
    match body.get("prompt"):
        case str(text):
            return [text]
        case [int(), *_] as tokens:
            return [detokenize(tokens)]
        case [_, *_] as several:
            return [each if isinstance(each, str) else detokenize(each) for each in several]
    raise _invalid("missing", "body.prompt", "Field required")


def _stream_options(body: Mapping[str, Any]) -> Mapping[str, Any]:
    given = body.get("stream_options")
    if given and not body.get("stream"):
        message = "Stream options can only be defined when `stream=True`."
        raise _invalid("value_error", "stream_options", message)
    return given if isinstance(given, dict) else {}


def _integer(body: Mapping[str, Any], key: str) -> int | None:
    try:
        value = _INTEGER.validate_json(json.dumps(body.get(key)))  # vLLM's models take 1.0 and "1", too
    except ValidationError as error:
        raise _invalid("int_parsing", f"body.{key}", "Input should be a valid integer") from error
    if value is None:
        return None
    if value < 1:
        raise ApiError(400, "BadRequestError", f"{key} must be at least 1, got {value}.", key)
    return value


def embedded_inputs(body: Mapping[str, Any]) -> list[list[int]]:
    """Read the tokens of each input of an embedding request: text, texts, tokens, or several of those."""
    match body.get("input"):
        case str(text):
            return [tokenize(text)]
        case [int(), *_] as tokens:
            return [tokens]
        case [_, *_] as several:
            return [tokenize(each) if isinstance(each, str) else each for each in several]
    raise _invalid("missing", "body.input", "Field required")


def _invalid(kind: str, param: str, message: str) -> ApiError:
    """A validation error as FastAPI and vLLM print it."""
    return ApiError(400, "Bad Request", f"1 validation error:\n  {{'type': '{kind}', 'msg': '{message}'}}", param)
