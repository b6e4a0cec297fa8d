"""The protocols of a fake provider: how each asks, answers, streams and fails."""

import json
import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
from typing import Protocol as TypingProtocol

PROMPT_TOKENS, ANSWER_TOKENS, THOUGHT_TOKENS, CACHED_TOKENS = 1000, 200, 50, 400
CALL_ID = "call_1"
IMAGE_WORDS = "an image"


class Answer(NamedTuple):
    """What a model says: pieces of a thought and of text, or of the arguments of a tool's call."""

    thought: Sequence[str]
    text: Sequence[str]
    tool: str = ""
    arguments: Sequence[str] = ()


class Protocol(TypingProtocol):
    """One provider's API."""

    stream_type: str

    def serves(self, path: str) -> bool:
        """Whether a path belongs to it."""

    def streams(self, path: str, body: Any) -> bool:
        """Whether a request asks for a stream."""

    def said(self, body: Any) -> str:
        """The last words of the user."""

    def tools(self, body: Any) -> list[str]:
        """The names of the tools."""

    def error(self, status: int, message: str) -> Any:
        """The body of an error."""

    def whole(self, answer: Answer, body: Any) -> Any:
        """A whole answer."""

    def events(self, answer: Answer, body: Any) -> Iterator[bytes]:
        """The events of a stream."""


def last_words(content: Any) -> str:
    """The text of a message; an image is said to be one."""
    if isinstance(content, str):
        return content
    texts = [part.get("text", IMAGE_WORDS) for part in content]
    return " ".join(texts)


class OpenAi:
    """OpenAI's chats, completions and embeddings."""

    stream_type = "text/event-stream"
    paths = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")

    def serves(self, path: str) -> bool:
        return path in self.paths

    def streams(self, path: str, body: Any) -> bool:
        return bool(body.get("stream"))

    def said(self, body: Any) -> str:
        return last_words(body["messages"][-1]["content"]) if "messages" in body else str(body.get("prompt", "embed"))

    def tools(self, body: Any) -> list[str]:
        return [tool["function"]["name"] for tool in body.get("tools", ())]

    def error(self, status: int, message: str) -> Any:
        return {"error": {"message": message, "type": "some_error", "param": "messages", "code": "some_code"}}

    def usage(self, answer: Answer) -> Any:
        thought = THOUGHT_TOKENS if answer.thought else 0
        return {
            "prompt_tokens": PROMPT_TOKENS,
            "completion_tokens": ANSWER_TOKENS,
            "total_tokens": PROMPT_TOKENS + ANSWER_TOKENS,
            "prompt_tokens_details": {"cached_tokens": CACHED_TOKENS},
            "completion_tokens_details": {"reasoning_tokens": thought},
        }

    def whole(self, answer: Answer, body: Any) -> Any:
        head = {"id": "provider-1", "created": 1, "model": body["model"]}
        if "input" in body:
            data = [{"object": "embedding", "index": 0, "embedding": [0.5, -0.5]}]
            return {**head, "object": "list", "data": data, "usage": {"prompt_tokens": 3, "total_tokens": 3}}
        if "prompt" in body:
            choice = {"index": 0, "text": "".join(answer.text), "finish_reason": "stop", "logprobs": None}
            return {**head, "object": "text_completion", "choices": [choice], "usage": self.usage(answer)}
        message: dict[str, Any] = {"role": "assistant", "content": "".join(answer.text) or None}
        if answer.thought:
            message["reasoning_content"] = "".join(answer.thought)
        if answer.tool:
            function = {"name": answer.tool, "arguments": "".join(answer.arguments)}
            message["tool_calls"] = [{"id": CALL_ID, "type": "function", "function": function}]
        choice = {"index": 0, "message": message, "finish_reason": "tool_calls" if answer.tool else "stop"}
        return {**head, "object": "chat.completion", "choices": [choice], "usage": self.usage(answer)}

    def events(self, answer: Answer, body: Any) -> Iterator[bytes]:
        chat = "messages" in body
        head = {"id": "provider-1", "created": 1, "model": body["model"]}
        head["object"] = "chat.completion.chunk" if chat else "text_completion"
        for delta in self._deltas(answer, chat):
            choice = {"index": 0, **({"delta": delta} if chat else delta), "finish_reason": None}
            yield _data({**head, "choices": [choice]})
        end = "tool_calls" if answer.tool else "stop"
        empty: dict[str, Any] = {"delta": {}} if chat else {"text": ""}
        yield _data({**head, "choices": [{"index": 0, **empty, "finish_reason": end}]})
        if (body.get("stream_options") or {}).get("include_usage"):
            yield _data({**head, "choices": [], "usage": self.usage(answer)})
        yield b"data: [DONE]\n\n"

    def _deltas(self, answer: Answer, chat: bool) -> Iterator[dict[str, Any]]:
        if not chat:
            yield from ({"text": piece} for piece in answer.text)
            return
        yield {"role": "assistant", "content": ""}
        yield from ({"reasoning_content": piece} for piece in answer.thought)
        yield from ({"content": piece} for piece in answer.text)
        if answer.tool:
            begun = {"index": 0, "id": CALL_ID, "type": "function", "function": {"name": answer.tool, "arguments": ""}}
            yield {"tool_calls": [begun]}
            yield from ({"tool_calls": [{"index": 0, "function": {"arguments": piece}}]} for piece in answer.arguments)


class Anthropic:
    """Anthropic's messages."""

    stream_type = "text/event-stream"

    def serves(self, path: str) -> bool:
        return path == "/v1/messages"

    def streams(self, path: str, body: Any) -> bool:
        return bool(body.get("stream"))

    def said(self, body: Any) -> str:
        return last_words(body["messages"][-1]["content"])

    def tools(self, body: Any) -> list[str]:
        return [tool["name"] for tool in body.get("tools", ())]

    def error(self, status: int, message: str) -> Any:
        return {"type": "error", "error": {"type": "some_error", "message": message}}

    def whole(self, answer: Answer, body: Any) -> Any:
        blocks = [block for block, _ in self._blocks(answer, whole=True)]
        usage = {"input_tokens": PROMPT_TOKENS, "output_tokens": ANSWER_TOKENS}
        message = {"id": "msg_1", "type": "message", "role": "assistant", "model": body["model"], "content": blocks}
        return {**message, "stop_reason": _stop_reason(answer), "stop_sequence": None, "usage": usage}

    def events(self, answer: Answer, body: Any) -> Iterator[bytes]:
        usage = {"input_tokens": PROMPT_TOKENS, "output_tokens": 1}
        head = {"id": "msg_1", "type": "message", "role": "assistant", "model": body["model"], "content": []}
        yield _named("message_start", message={**head, "stop_reason": None, "stop_sequence": None, "usage": usage})
        for index, (block, deltas) in enumerate(self._blocks(answer, whole=False)):
            yield _named("content_block_start", index=index, content_block=block)
            for delta in deltas:
                yield _named("content_block_delta", index=index, delta=delta)
            yield _named("content_block_stop", index=index)
        end = {"stop_reason": _stop_reason(answer), "stop_sequence": None}
        yield _named("message_delta", delta=end, usage={"output_tokens": ANSWER_TOKENS})
        yield _named("message_stop")

    def _blocks(self, answer: Answer, *, whole: bool) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
        def said(pieces: Sequence[str]) -> str:
            return "".join(pieces) if whole else ""

        if answer.thought:
            deltas = [{"type": "thinking_delta", "thinking": piece} for piece in answer.thought]
            signed = [*deltas, {"type": "signature_delta", "signature": "signed"}]
            yield {"type": "thinking", "thinking": said(answer.thought), "signature": said(("signed",))}, signed
        if answer.text:
            yield (
                {"type": "text", "text": said(answer.text)},
                [{"type": "text_delta", "text": piece} for piece in answer.text],
            )
        if answer.tool:
            arguments = json.loads("".join(answer.arguments)) if whole else {}
            yield (
                {"type": "tool_use", "id": CALL_ID, "name": answer.tool, "input": arguments},
                [{"type": "input_json_delta", "partial_json": piece} for piece in answer.arguments],
            )


class Bedrock:
    """Bedrock's Converse, whose streams are Amazon's event streams."""

    stream_type = "application/vnd.amazon.eventstream"

    def serves(self, path: str) -> bool:
        return path.startswith("/model/")

    def streams(self, path: str, body: Any) -> bool:
        return path.endswith("/converse-stream")

    def said(self, body: Any) -> str:
        return last_words(body["messages"][-1]["content"])

    def tools(self, body: Any) -> list[str]:
        return [tool["toolSpec"]["name"] for tool in body.get("toolConfig", {}).get("tools", ())]

    def error(self, status: int, message: str) -> Any:
        return {"message": message}

    def whole(self, answer: Answer, body: Any) -> Any:
        blocks: list[dict[str, Any]] = []
        if answer.thought:
            blocks.append({"reasoningContent": {"reasoningText": {"text": "".join(answer.thought)}}})
        if answer.text:
            blocks.append({"text": "".join(answer.text)})
        if answer.tool:
            called = {"toolUseId": CALL_ID, "name": answer.tool, "input": json.loads("".join(answer.arguments))}
            blocks.append({"toolUse": called})
        message = {"message": {"role": "assistant", "content": blocks}}
        return {"output": message, "stopReason": _stop_reason(answer), "usage": self._usage, "metrics": {}}

    def events(self, answer: Answer, body: Any) -> Iterator[bytes]:
        yield _framed("messageStart", {"role": "assistant"})
        blocks: list[tuple[dict[str, Any], list[dict[str, Any]]]] = []
        if answer.thought:
            blocks.append(({}, [{"reasoningContent": {"text": piece}} for piece in answer.thought]))
        if answer.text:
            blocks.append(({}, [{"text": piece} for piece in answer.text]))
        if answer.tool:
            start = {"start": {"toolUse": {"toolUseId": CALL_ID, "name": answer.tool}}}
            blocks.append((start, [{"toolUse": {"input": piece}} for piece in answer.arguments]))
        for index, (begun, deltas) in enumerate(blocks):
            if begun:
                yield _framed("contentBlockStart", {**begun, "contentBlockIndex": index})
            for delta in deltas:
                yield _framed("contentBlockDelta", {"delta": delta, "contentBlockIndex": index})
            yield _framed("contentBlockStop", {"contentBlockIndex": index})
        yield _framed("messageStop", {"stopReason": _stop_reason(answer)})
        yield _framed("metadata", {"usage": self._usage, "metrics": {"latencyMs": 1}})

    @property
    def _usage(self) -> dict[str, int]:
        total = PROMPT_TOKENS + ANSWER_TOKENS
        return {"inputTokens": PROMPT_TOKENS, "outputTokens": ANSWER_TOKENS, "totalTokens": total}


PROTOCOLS: tuple[Protocol, ...] = (OpenAi(), Anthropic(), Bedrock())


def _stop_reason(answer: Answer) -> str:
    return "tool_use" if answer.tool else "end_turn"


def _data(fields: Any) -> bytes:
    return f"data: {json.dumps(fields)}\n\n".encode()


def _named(name: str, **fields: Any) -> bytes:
    return f"event: {name}\ndata: {json.dumps({'type': name, **fields})}\n\n".encode()


def _framed(name: str, fields: Any) -> bytes:
    """Encode one message of an event stream: lengths, headers, payload, and two checksums."""
    described = {":event-type": name, ":content-type": "application/json", ":message-type": "event"}
    headers = b"".join(
        [
            struct.pack("!B", len(key)) + key.encode() + struct.pack("!BH", 7, len(value)) + value.encode()
            for key, value in described.items()
        ]
    )
    payload = json.dumps(fields).encode()
    prelude = struct.pack("!II", len(headers) + len(payload) + 16, len(headers))
    message = prelude + struct.pack("!I", zlib.crc32(prelude)) + headers + payload
    return message + struct.pack("!I", zlib.crc32(message))
