"""One completion over HTTP, watched token by token."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from serving.clients import root_of
from serving.measuring.figures import Chunk, Exchange, arrivals

EVENT = "data: "
ERROR_LETTERS = 300


@dataclass(slots=True)
class Ongoing:
    """A request while it runs; `exchange()` is what is known of it so far."""

    sent_seconds: float
    prompt_tokens: int
    chunks: list[Chunk] = field(default_factory=list)
    total_tokens: int | None = None
    ended_seconds: float | None = None
    failure: str | None = None

    def exchange(self) -> Exchange:
        """Freeze it."""
        seen = arrivals(self.chunks, self.total_tokens)
        return Exchange(self.sent_seconds, self.prompt_tokens, seen, self.ended_seconds, self.failure)


@dataclass(frozen=True, slots=True)
class Target:
    """Where completions come from, and the model's name there."""

    client: httpx.AsyncClient
    url: str
    model: str
    api_key: str | None = None


class Failed(Exception):
    """The server said no, or something that is no completion."""


async def complete(
    target: Target, prompt: list[int], answer_tokens: int, ongoing: Ongoing, on_first_token: Callable[[], None]
) -> None:
    """Have one answer generated and note when its tokens come; a failure is noted, too, and not raised."""
    body = {
        "model": target.model,
        "prompt": prompt,
        "max_tokens": answer_tokens,
        # The answer's length is the measurement's to choose. No `seed`: with it, vLLM's engine dies on CPU.
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    try:
        await _stream(target, body, ongoing, on_first_token)
    except Failed as error:
        ongoing.failure = str(error)
    except httpx.HTTPError as error:
        ongoing.failure = str(error) or type(error).__name__
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        ongoing.failure = f"the stream is not vLLM's: {error!r}"[:ERROR_LETTERS]
    ongoing.ended_seconds = time.monotonic()


async def _stream(target: Target, body: dict[str, Any], ongoing: Ongoing, on_first_token: Callable[[], None]) -> None:
    headers = {"authorization": f"Bearer {target.api_key}"} if target.api_key else {}
    url = f"{root_of(target.url)}/v1/completions"
    async with target.client.stream("POST", url, json=body, headers=headers) as reply:
        if reply.status_code != httpx.codes.OK:
            raise Failed(f"{reply.status_code}: {_error_text(await reply.aread())}")
        async for line in reply.aiter_lines():
            if line.startswith(EVENT):
                _note(line.removeprefix(EVENT), ongoing, on_first_token)
    if not ongoing.chunks:
        raise Failed("the stream ended without a token")


def _note(event: str, ongoing: Ongoing, on_first_token: Callable[[], None]) -> None:
    """Take one event of the stream."""
    if event == "[DONE]":
        return
    event_data: dict[str, Any] = json.loads(event)
    if "error" in event_data:
        raise Failed(_message(event_data["error"]))
    usage = event_data.get("usage")
    tokens = usage["completion_tokens"] if usage else None
    if not event_data["choices"]:
        # The last event has no text; its usage holds for all of the answer.
        ongoing.total_tokens = tokens
        if usage:
            ongoing.prompt_tokens = usage["prompt_tokens"]
    elif tokens != 0:
        ongoing.chunks.append(Chunk(time.monotonic(), tokens))
        if len(ongoing.chunks) == 1:
            on_first_token()


def _error_text(body: bytes) -> str:
    try:
        return _message(json.loads(body)["error"])
    except (ValueError, LookupError, TypeError):
        return body.decode(errors="replace").strip()[:ERROR_LETTERS] or "no reason given"


def _message(error: Any) -> str:
    text = error.get("message", "") if isinstance(error, dict) else error
    return " ".join(str(text).split())[:ERROR_LETTERS]
