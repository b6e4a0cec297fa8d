"""From what is asked to what is sent: chunks of a stream, whole answers, and the page of metrics."""

from collections.abc import Iterable, Mapping
from typing import Any

from tests.fakes.asks import Ask, Kind
from tests.fakes.options import Options

STREAM_OBJECTS: dict[Kind, str] = {"chat": "chat.completion.chunk", "text": "text_completion"}
WHOLE_OBJECTS: dict[Kind, str] = {"chat": "chat.completion", "text": "text_completion"}


def role_chunks(ask: Ask) -> list[dict[str, Any]]:
    """What a chat stream begins with: a role and no text, for each choice."""
    if ask.kind == "text":
        return []
    delta = {"role": "assistant", "content": ""}
    return [
        _chunk(ask, {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}, 0)
        for index in range(len(ask.choices))
    ]


def step_chunks(ask: Ask, step: int) -> list[dict[str, Any]]:
    """One token for each choice; the last one says why it is the last."""
    ending: dict[str, str | None] = {"finish_reason": None}
    if step == ask.steps - 1:
        ending = {"finish_reason": ask.finish_reason, "stop_reason": None}
    return [
        _chunk(
            ask,
            {"index": index, **_piece(ask, step, tokens[step]), **_logprobs(ask, [tokens[step]]), **ending},
            step + 1,
        )
        for index, tokens in enumerate(ask.choices)
    ]


def usage_chunk(ask: Ask) -> dict[str, Any]:
    """The chunk without choices that ends a stream for clients who asked for usage."""
    return {**_envelope(ask, STREAM_OBJECTS[ask.kind]), "choices": [], "usage": usage(ask, ask.steps)}


def whole(ask: Ask) -> dict[str, Any]:
    """The answer to a client who did not ask for a stream."""
    ending = {"finish_reason": ask.finish_reason, "stop_reason": None, "token_ids": ask.token_ids}
    return {
        **_envelope(ask, WHOLE_OBJECTS[ask.kind]),
        "choices": [
            # vLLM puts them into the choices of a completion, and beside those of a chat.
            {
                "index": index,
                **_said(ask, tokens),
                **_logprobs(ask, tokens),
                **ending,
                "prompt_logprobs": ask.prompt_logprobs,
            }
            for index, tokens in enumerate(ask.choices)
        ],
        "service_tier": None,
        "system_fingerprint": ask.fingerprint,
        "usage": {**usage(ask, ask.steps), "prompt_tokens_details": None},
        "prompt_logprobs": None,
        "kv_transfer_params": None,
    }


def usage(ask: Ask, steps: int) -> dict[str, Any]:
    """Tokens so far, over all choices."""
    completion_tokens = steps * len(ask.choices)
    counted: dict[str, Any] = {
        "prompt_tokens": ask.prompt_tokens,
        "total_tokens": ask.prompt_tokens + completion_tokens,
        "completion_tokens": completion_tokens,
    }
    if ask.reasoning_steps:
        reasoning_tokens = min(steps, ask.reasoning_steps) * len(ask.choices)
        counted["completion_tokens_details"] = {"reasoning_tokens": reasoning_tokens}
    return counted


def models(options: Options, created: int) -> dict[str, Any]:
    """All names this replica answers to: those of the model, then its adapters."""
    card = {"object": "model", "created": created, "owned_by": "vllm", "root": options.model, "parent": None}
    names = [{"id": name, **card, "max_model_len": options.max_model_len} for name in options.served]
    changed = {"parent": options.served[0], "max_model_len": None}
    adapters = [{"id": name, **card, "root": root, **changed} for name, root in options.adapters.items()]
    return {"object": "list", "data": [*names, *adapters]}


def metrics(model: str, gauges: Mapping[str, float], counters: Mapping[str, float]) -> str:
    """A Prometheus page; a name may carry labels of its own behind a `|`."""
    lines: list[str] = []
    for kind, values in (("gauge", gauges), ("counter", counters)):
        for full_name, value in values.items():
            name, _, extra = full_name.partition("|")
            suffix = "_total" if kind == "counter" else ""
            type_line = f"# TYPE vllm:{name}{suffix} {kind}"
            if type_line not in lines:
                lines += [f"# HELP vllm:{name}{suffix} {name.replace('_', ' ')}.", type_line]
            labels = ",".join(filter(None, ['engine="0"', extra, f'model_name="{model}"']))
            lines.append(f"vllm:{name}{suffix}{{{labels}}} {float(value)}")
    return "\n".join([*lines, ""])


def _chunk(ask: Ask, choice: dict[str, Any], steps: int) -> dict[str, Any]:
    chunk = {**_envelope(ask, STREAM_OBJECTS[ask.kind]), "choices": [choice]}
    return {**chunk, "usage": usage(ask, steps)} if ask.continuous_usage else chunk


def _envelope(ask: Ask, kind: str) -> dict[str, Any]:
    return {"id": ask.id, "object": kind, "created": ask.created, "model": ask.model}


def _piece(ask: Ask, step: int, token: str) -> dict[str, Any]:
    if ask.kind == "text":
        return {"text": token}
    if ask.tool:
        function = {"name": ask.tool, "arguments": token} if step == 0 else {"arguments": token}
        opening = {"id": call_id(ask), "type": "function"} if step == 0 else {}
        return {"delta": {"tool_calls": [{**opening, "index": 0, "function": function}]}}
    return {"delta": {"reasoning" if step < ask.reasoning_steps else "content": token}}


def _said(ask: Ask, tokens: tuple[str, ...]) -> dict[str, Any]:
    if ask.kind == "text":
        return {"text": "".join(tokens)}
    # As with a reasoning parser: empty parts are null, and there is no `tool_calls` without calls.
    content = None if ask.tool else "".join(tokens[ask.reasoning_steps :]) or None
    message: dict[str, Any] = {
        "role": "assistant",
        "content": content,
        "refusal": None,
        "annotations": None,
        "audio": None,
        "function_call": None,
        "reasoning": "".join(tokens[: ask.reasoning_steps]) or None,
    }
    if ask.tool:
        function = {"name": ask.tool, "arguments": "".join(tokens)}
        message["tool_calls"] = [{"id": call_id(ask), "type": "function", "function": function}]
    return {"message": message}


def call_id(ask: Ask) -> str:
    """Name a tool call as vLLM does."""
    return f"chatcmpl-tool-{ask.id[-8:]}"


def _logprobs(ask: Ask, tokens: Iterable[str]) -> dict[str, Any]:
    """Every token is as likely as any other; the older endpoint has a shape of its own."""
    if not ask.logprobs:
        return {"logprobs": None}
    if ask.kind == "text":
        said = list(tokens)
        offsets = [sum(map(len, said[:number])) for number in range(len(said))]
        top = [{token: -0.5} for token in said]
        weights = [-0.5] * len(said)
        return {"logprobs": {"text_offset": offsets, "token_logprobs": weights, "tokens": said, "top_logprobs": top}}
    logprobs = [{"token": token, "logprob": -0.5, "bytes": list(token.encode())} for token in tokens]
    return {"logprobs": {"content": [{**each, "top_logprobs": [each]} for each in logprobs]}}
