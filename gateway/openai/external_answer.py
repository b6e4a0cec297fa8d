"""Answers of external models in the form of a replica's: objects of litellm, as plain values, to OpenAI's JSON.

litellm adds fields of its own (`provider_specific_fields`, `citations`), and fills in what a provider does not send. A
client gets the fields that vLLM sends, in the same order: the filter of streams relies on `model` before `choices`.
Reasoning is called `reasoning`, as vLLM calls it. Ids are made from the id of the request, as vLLM makes them.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import msgspec

from gateway.openai.endpoints import CHAT, COMPLETIONS, Endpoint

Fields = Mapping[str, Any]

_PREFIXES = {CHAT.name: "chatcmpl-", COMPLETIONS.name: "cmpl-"}
_DETAILS = {
    "prompt_tokens_details": ("cached_tokens", "audio_tokens"),
    "completion_tokens_details": ("reasoning_tokens", "audio_tokens"),
}
_REASONING = ("reasoning_content", "reasoning")

_ENCODER = msgspec.json.Encoder()


class AnswerForm(Protocol):
    """Encodes an answer of litellm for one endpoint; `end` ends a stream."""

    @property
    def end(self) -> bytes:
        """The last event of a stream; empty if another one ends it."""

    def whole(self, answer: Fields) -> bytes:
        """Encode a whole answer."""

    def events(self, chunk: Fields, begun: frozenset[int]) -> Iterator[bytes]:
        """Encode a part of a stream; `begun` are the choices that have sent their role."""

    def usage(self, answer: Fields) -> Fields | None:
        """The token counts of a whole answer or of a part, by the names of chats; None if it has none."""


class ChoicesForm(msgspec.Struct, frozen=True):
    """Implements AnswerForm for chats, completions and embeddings."""

    endpoint: Endpoint
    request_id: str
    end: bytes = b"data: [DONE]\n\n"

    @property
    def id(self) -> str:
        """The id of the answer."""
        return f"{_PREFIXES.get(self.endpoint.name, '')}{self.request_id}"

    def whole(self, answer: Fields) -> bytes:
        """Encode a whole answer."""
        if self.endpoint.generates:
            choices = [_choice(self.endpoint, choice) for choice in answer.get("choices") or ()]
            fields = {**self._head(answer), "choices": choices}
        else:
            data = [_embedding(place, entry) for place, entry in enumerate(answer.get("data") or ())]
            fields = {"object": "list", "model": answer.get("model") or "", "data": data}
        return _ENCODER.encode({**fields, "usage": usage_fields(answer.get("usage"))})

    def events(self, chunk: Fields, begun: frozenset[int]) -> Iterator[bytes]:
        """Encode a part of a stream; `begun` are the choices that have sent their role."""
        choices = [choice for choice in chunk.get("choices") or () if isinstance(choice, dict)]
        if self.endpoint is CHAT:
            roles = [_role(choice) for choice in choices if _index(choice) not in begun]
            if roles:
                yield self._event(chunk, roles, ".chunk")
        parts = [part for choice in choices if (part := _part(self.endpoint, choice)) is not None]
        if parts:
            yield self._event(chunk, parts, ".chunk" if self.endpoint is CHAT else "")
        if (usage := chunk.get("usage")) is not None:
            suffix = ".chunk" if self.endpoint is CHAT else ""
            fields = {**self._head(chunk, suffix), "choices": [], "usage": usage_fields(usage)}
            yield b"data: %b\n\n" % _ENCODER.encode(fields)

    def usage(self, answer: Fields) -> Fields | None:
        """The token counts of a whole answer or of a part; None if it has none."""
        usage = answer.get("usage")
        return usage if isinstance(usage, dict) else None

    def _event(self, chunk: Fields, choices: list[dict[str, Any]], suffix: str) -> bytes:
        return b"data: %b\n\n" % _ENCODER.encode({**self._head(chunk, suffix), "choices": choices})

    def _head(self, answer: Fields, suffix: str = "") -> dict[str, Any]:
        kind = "chat.completion" if self.endpoint is CHAT else "text_completion"
        created = answer.get("created")
        return {
            "id": self.id,
            "object": f"{kind}{suffix}",
            "created": created if isinstance(created, int) else 0,
            "model": answer.get("model") or "",
        }


def choice_indices(chunk: Fields) -> frozenset[int]:
    """The choices that a part of a stream concerns."""
    return frozenset([_index(choice) for choice in chunk.get("choices") or () if isinstance(choice, dict)])


def finishes(chunk: Fields) -> bool:
    """Whether a part of a stream says why a choice ended."""
    return any(choice.get("finish_reason") for choice in chunk.get("choices") or () if isinstance(choice, dict))


def usage_fields(usage: Any) -> dict[str, Any] | None:
    """Token counts, with the details that are known."""
    if not isinstance(usage, dict):
        return None
    prompt, completion = token_count(usage, "prompt_tokens"), token_count(usage, "completion_tokens")
    fields: dict[str, Any] = {"prompt_tokens": prompt, "total_tokens": prompt + completion}
    fields["completion_tokens"] = completion
    for name, counts in _DETAILS.items():
        details = usage.get(name)
        known = {key: details[key] for key in counts if details.get(key)} if isinstance(details, dict) else {}
        if known:
            fields[name] = known
    return fields


def token_count(usage: Fields, name: str) -> int:
    """One count of a usage object; 0 if it is missing."""
    count = usage.get(name)
    return count if isinstance(count, int) else 0


def _index(choice: Fields) -> int:
    index = choice.get("index")
    return index if isinstance(index, int) else 0


def _role(choice: Fields) -> dict[str, Any]:
    return {
        "index": _index(choice),
        "delta": {"role": "assistant", "content": ""},
        "logprobs": None,
        "finish_reason": None,
    }


def _part(endpoint: Endpoint, choice: Fields) -> dict[str, Any] | None:
    """One choice of a part; None if it carries nothing but a role."""
    reason, logprobs = choice.get("finish_reason"), choice.get("logprobs")
    if endpoint is not CHAT:
        text = choice.get("text") or ""
        content: dict[str, Any] = {"text": text}
        empty = not text
    else:
        delta = choice.get("delta")
        plain = _spoken(delta) if isinstance(delta, dict) else {}
        content, empty = {"delta": plain}, not plain
    if empty and not reason:
        return None
    return {"index": _index(choice), **content, "logprobs": logprobs, "finish_reason": reason}


def _choice(endpoint: Endpoint, choice: Fields) -> dict[str, Any]:
    reason, logprobs = choice.get("finish_reason"), choice.get("logprobs")
    if endpoint is not CHAT:
        content: dict[str, Any] = {"text": choice.get("text") or ""}
    else:
        message = choice.get("message")
        spoken = _spoken(message) if isinstance(message, dict) else {}
        content = {"message": {"role": "assistant", "content": None, **spoken}}
    return {"index": _index(choice), **content, "logprobs": logprobs, "finish_reason": reason}


def _spoken(message: Fields) -> dict[str, Any]:
    """What a message, or a delta of one, says: only what is there."""
    fields: dict[str, Any] = {}
    if reasoning := next((message[key] for key in _REASONING if message.get(key)), None):
        fields["reasoning"] = reasoning
    for name in ("content", "refusal", "audio", "function_call"):
        if message.get(name):
            fields[name] = message[name]
    if calls := message.get("tool_calls"):
        fields["tool_calls"] = [_tool_call(call) for call in calls if isinstance(call, dict)]
    return fields


def _tool_call(call: Fields) -> dict[str, Any]:
    function = call.get("function")
    function = function if isinstance(function, dict) else {}
    named = {name: function[name] for name in ("name", "arguments") if function.get(name) is not None}
    begins = {"id": call["id"], "type": "function"} if call.get("id") else {}
    return {**({"index": call["index"]} if "index" in call else {}), **begins, "function": named}


def _embedding(place: int, entry: Any) -> dict[str, Any]:
    fields = entry if isinstance(entry, dict) else {}
    return {"object": "embedding", "index": fields.get("index", place), "embedding": fields.get("embedding")}
