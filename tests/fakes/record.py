"""Write `recorded/`: streams in vLLM's own bytes, made by vLLM's own classes: `python -m tests.fakes.record`.

Run it again when the version of vLLM changes; what changes in the files is what clients will see.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.generate.base.protocol import DeltaMessage
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionStreamResponse
from vllm.entrypoints.openai.responses.protocol import (
    ResponseCompletedEvent,
    ResponseCreatedEvent,
    ResponseInProgressEvent,
    ResponsesRequest,
    ResponsesResponse,
    ResponseUsage,
)
from vllm.entrypoints.openai.responses.streaming_events import SimpleStreamingEventProcessor

Deltas = list[tuple[dict[str, Any], dict[str, Any]]]
RECORDED = Path(__file__).with_name("recorded")
DONE = "data: [DONE]\n\n"
TOKENS = ("Der", " Bär", " schläft", "。汉字", " 👩‍👩‍👧", ' "model":"m1"', "\\n", "\n\n")
# What a client calls its own things must not be taken for the model's name.
ASKED = {"model": "m1", "input": "hello", "stream": True, "metadata": {"model": "m1"}}
COUNTED = '{"prompt_tokens":31,"total_tokens":31,"completion_tokens":0}'
CALLS = [
    {"id": "chatcmpl-tool-1", "type": "function", "index": 0, "function": {"name": "weather", "arguments": ""}},
    {"index": 0, "function": {"arguments": '{"city": "Zü'}},
    {"index": 0, "function": {"arguments": 'rich"}'}},
    {"id": "chatcmpl-tool-2", "type": "function", "index": 1, "function": {"name": "now", "arguments": "{}"}},
]


def main() -> None:
    """Write one file for each kind of stream."""
    chat = dict(chat_streams())
    for name, events in chat.items():
        _write(name, events)
    for name in ("text", "tools", "reasoning"):
        _write(f"messages-{name}", asyncio.run(_messages(chat[name])))
    _write("responses-text", responses_stream())


def chat_streams() -> Iterable[tuple[str, list[str]]]:
    """Chat streams, by what is in them; each with usage at its end."""
    said: Deltas = [({"content": token}, {}) for token in TOKENS]
    thought: Deltas = [({"reasoning": token}, {}) for token in TOKENS[:4]]
    called: Deltas = [({"tool_calls": [call]}, {}) for call in CALLS]
    weighed = [({"content": token}, {"logprobs": _logprobs(token)}) for token in TOKENS]
    yield "text", _chat(said, "stop")
    yield "reasoning", _chat([*thought, *said], "stop")
    yield "tools", _chat([*thought[:1], *said[:2], *called], "tool_calls")
    yield "logprobs", _chat(weighed, "length")
    yield "choices", _chat(said, "stop", choices=3)


def _chat(deltas: Deltas, reason: str, choices: int = 1) -> list[str]:
    everyone = range(choices)
    opening = [
        _chunk(index, {"role": "assistant", "content": ""}, logprobs=None, finish_reason=None) for index in everyone
    ]
    steps = [
        _chunk(index, delta, **{"logprobs": None, "finish_reason": None, "token_ids": None, **more})
        for (delta, more), index in itertools.product(deltas, everyone)
    ]
    endings = [
        _chunk(index, {"content": ""}, logprobs=None, finish_reason=reason, stop_reason=None) for index in everyone
    ]
    return [*opening, *steps, *endings, _usage_chunk(len(deltas) * choices), DONE]


def _chunk(index: int, delta: dict[str, Any], **more: Any) -> str:
    return _event({"choices": [{"index": index, "delta": delta, **more}]})


def _usage_chunk(tokens: int) -> str:
    return _event(
        {"choices": [], "usage": {"prompt_tokens": 31, "total_tokens": 31 + tokens, "completion_tokens": tokens}}
    )


def _event(fields: dict[str, Any]) -> str:
    envelope = {"id": "chatcmpl-9f3c", "object": "chat.completion.chunk", "created": 1795000000, "model": "m1"}
    chunk = ChatCompletionStreamResponse.model_validate({**envelope, **fields})
    return f"data: {chunk.model_dump_json(exclude_unset=True)}\n\n"


def _logprobs(token: str) -> dict[str, Any]:
    def of(text: str, logprob: float) -> dict[str, Any]:
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    return {"content": [{**of(token, -0.1), "top_logprobs": [of(token, -0.1), of("é", -12345.678), of("x", -1e-07)]}]}


async def _messages(chat: list[str]) -> list[str]:
    """The same answer as Anthropic's clients get it."""

    async def generator() -> AsyncIterator[str]:
        for event in chat:
            # This endpoint has every chunk of the chat counted.
            yield event.replace("]}\n\n", '],"usage":' + COUNTED + "}\n\n")

    converter = AnthropicServingMessages.__new__(AnthropicServingMessages)
    return [event async for event in converter.message_stream_converter(generator())]


def responses_stream() -> list[str]:
    """A stream of the Responses API: created, in progress, one message in pieces, completed."""
    request = ResponsesRequest.model_validate({**ASKED, "request_id": "resp_9f3c"})
    sampling = request.to_sampling_params(default_max_tokens=64, default_sampling_params={})
    processor = SimpleStreamingEventProcessor()
    numbers = itertools.count()

    def written(event: Any) -> str:
        event.sequence_number = next(numbers)
        return f"event: {event.type}\ndata: {event.model_dump_json(indent=None, by_alias=True)}\n\n"

    def response(status: Any, output: list[Any], usage: Any) -> Any:
        return ResponsesResponse.from_request(
            request, sampling, model_name="m1", created_time=1795000000, output=output, status=status, usage=usage
        )

    first = response("in_progress", [], None).model_dump(mode="json", by_alias=True)
    events = [
        written(ResponseCreatedEvent(type="response.created", sequence_number=-1, response=first)),
        written(ResponseInProgressEvent(type="response.in_progress", sequence_number=-1, response=first)),
    ]
    for token in TOKENS:
        delta = DeltaMessage(content=token)
        target, call = processor.resolve_target_state(delta)
        if processor.needs_transition(target, call):
            events += map(written, [*processor.close_current(), *processor.open(target, call)])
        events += map(written, processor.emit_delta(delta, None))
    events += map(written, processor.close_current())
    counted = {
        "input_tokens": 31,
        "input_tokens_details": {
            "cached_tokens": 0,
            "cache_write_tokens": 0,
            "input_tokens_per_turn": [],
            "cached_tokens_per_turn": [],
        },
        "output_tokens": len(TOKENS),
        "output_tokens_details": {
            "reasoning_tokens": 0,
            "tool_output_tokens": 0,
            "output_tokens_per_turn": [],
            "tool_output_tokens_per_turn": [],
        },
        "total_tokens": 31 + len(TOKENS),
    }
    last = response("completed", processor.output_items, ResponseUsage.model_validate(counted))
    events.append(written(ResponseCompletedEvent(type="response.completed", sequence_number=-1, response=last)))
    return events


def _write(name: str, events: list[str]) -> None:
    (RECORDED / f"{name}.sse").write_bytes("".join(events).encode())


if __name__ == "__main__":
    main()
