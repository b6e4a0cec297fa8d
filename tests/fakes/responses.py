"""The dialect of `/v1/responses` as vLLM speaks it: numbered events, keys in vLLM's order, no `[DONE]`."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from tests.fakes import answers
from tests.fakes.asks import Ask


@dataclass(slots=True)
class ResponseStream:
    """One stream: its events are numbered, and its items remembered for the end."""

    ask: Ask
    _numbers: "count[int]" = field(default_factory=count)
    _items: list[dict[str, Any]] = field(default_factory=list)

    def greeting(self) -> bytes:
        """Say that it was taken in; comes before the first token does."""
        response = whole(self.ask, status="in_progress")
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def step(self, number: int) -> bytes:
        """Give one token, and open and close its item where it is the first or the last of it."""
        ask = self.ask
        first = 0 if number < ask.reasoning_steps else ask.reasoning_steps
        last = (ask.reasoning_steps if number < ask.reasoning_steps else ask.steps) - 1
        events = list(self._opened(number)) if number == first else []
        events.append(self._delta(number))
        if number == last:
            events += self._closed(number, "".join(ask.choices[0][first : last + 1]))
        return b"".join(events)

    def ending(self) -> bytes:
        """Give the whole response once more, with its usage."""
        return self._event("response.completed", response=whole(self.ask, self._items))

    def _opened(self, number: int) -> Iterator[bytes]:
        item = _item(self.ask, number, None)
        yield self._event("response.output_item.added", item=item, output_index=len(self._items))
        if not self.ask.tool:
            yield self._event("response.content_part.added", **self._place(number), part=_part(self.ask, number, ""))

    def _delta(self, number: int) -> bytes:
        token = self.ask.choices[0][number]
        if self.ask.tool:
            place = self._place(number, content=False)
            return self._event("response.function_call_arguments.delta", delta=token, **place)
        if number < self.ask.reasoning_steps:
            return self._event("response.reasoning_text.delta", delta=token, **self._place(number))
        return self._event("response.output_text.delta", delta=token, **self._place(number), logprobs=[])

    def _closed(self, number: int, text: str) -> Iterator[bytes]:
        ask = self.ask
        item = _item(ask, number, text)
        if ask.tool:
            place = self._place(number, content=False)
            yield self._event("response.function_call_arguments.done", arguments=text, name=ask.tool, **place)
        else:
            kind = "reasoning_text" if number < ask.reasoning_steps else "output_text"
            extra: dict[str, Any] = {} if number < ask.reasoning_steps else {"logprobs": []}
            yield self._event(f"response.{kind}.done", **self._place(number), text=text, **extra)
            yield self._event("response.content_part.done", **self._place(number), part=_part(ask, number, text))
        yield self._event("response.output_item.done", item=item, output_index=len(self._items))
        self._items.append(item)

    def _place(self, number: int, *, content: bool = True) -> dict[str, Any]:
        place = {"item_id": _item_id(self.ask, number), "output_index": len(self._items)}
        return {"content_index": 0, **place} if content else place

    def _event(self, kind: str, **fields: Any) -> bytes:
        # The openai package's models, which vLLM uses, have their fields in alphabetical order.
        body = dict(sorted({**fields, "sequence_number": next(self._numbers), "type": kind}.items()))
        return f"event: {kind}\ndata: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


def whole(ask: Ask, output: list[dict[str, Any]] | None = None, status: str | None = None) -> dict[str, Any]:
    """Answer at once; what was asked is repeated."""
    done = status is None
    cut = ask.finish_reason == "length"
    status = status or ("incomplete" if cut else "completed")
    asked = ask.body
    return {
        "id": ask.id,
        "created_at": ask.created,
        "incomplete_details": {"reason": "max_output_tokens"} if done and cut else None,
        "instructions": asked.get("instructions"),
        "metadata": asked.get("metadata"),
        "model": ask.model,
        "object": "response",
        "output": (list(_items(ask)) if output is None else output) if done else [],
        "parallel_tool_calls": asked.get("parallel_tool_calls", True),
        "temperature": asked.get("temperature", 1.0),
        "tool_choice": asked.get("tool_choice", "auto"),
        "tools": asked.get("tools", []),
        "top_p": asked.get("top_p", 1.0),
        "background": False,
        "max_output_tokens": asked.get("max_output_tokens", ask.steps),
        "max_tool_calls": None,
        "previous_response_id": asked.get("previous_response_id"),
        "prompt": None,
        "reasoning": asked.get("reasoning"),
        "service_tier": "auto",
        "status": status,
        "text": asked.get("text"),
        "top_logprobs": None,
        "truncation": "disabled",
        "usage": usage(ask) if done else None,
        "user": asked.get("user"),
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "kv_transfer_params": None,
        "ec_transfer_params": None,
        "input_messages": None,
        "output_messages": None,
    }


def usage(ask: Ask) -> dict[str, Any]:
    """Count all tokens."""
    counted = answers.usage(ask, ask.steps)
    return {
        "input_tokens": counted["prompt_tokens"],
        "input_tokens_details": {
            "cached_tokens": 0,
            "cache_write_tokens": 0,
            "input_tokens_per_turn": [],
            "cached_tokens_per_turn": [],
        },
        "output_tokens": counted["completion_tokens"],
        "output_tokens_details": {
            "reasoning_tokens": ask.reasoning_steps,
            "tool_output_tokens": 0,
            "output_tokens_per_turn": [],
            "tool_output_tokens_per_turn": [],
        },
        "total_tokens": counted["total_tokens"],
    }


def _items(ask: Ask) -> Iterator[dict[str, Any]]:
    tokens = ask.choices[0]
    if ask.reasoning_steps:
        yield _item(ask, 0, "".join(tokens[: ask.reasoning_steps]))
    if ask.steps > ask.reasoning_steps:
        yield _item(ask, ask.steps - 1, "".join(tokens[ask.reasoning_steps :]))


def _item(ask: Ask, number: int, text: str | None) -> dict[str, Any]:
    """Describe what a step belongs to; None: it has only begun."""
    status = "in_progress" if text is None else "completed"
    item_id = _item_id(ask, number)
    if ask.tool:
        called = {"arguments": text or "", "call_id": answers.call_id(ask), "name": ask.tool, "type": "function_call"}
        return {**called, "id": item_id, "namespace": None, "status": status}
    content = [] if text is None else [_part(ask, number, text)]
    if number < ask.reasoning_steps:
        kept = {"content": content or None, "encrypted_content": None, "status": status}
        return {"id": item_id, "summary": [], "type": "reasoning", **kept}
    return {"id": item_id, "content": content, "role": "assistant", "status": status, "type": "message", "phase": None}


def _part(ask: Ask, number: int, text: str) -> dict[str, Any]:
    if number < ask.reasoning_steps:
        return {"text": text, "type": "reasoning_text"}
    return {"annotations": [], "text": text, "type": "output_text", "logprobs": None if text else []}


def _item_id(ask: Ask, number: int) -> str:
    prefix = "fc" if ask.tool else "rs" if number < ask.reasoning_steps else "msg"
    return f"{prefix}_{ask.id[-16:]}"
