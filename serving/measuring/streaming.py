"""One streamed completion, timed token by token."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx

from serving.clients import root_of
from serving.measuring.figures import Chunk, Exchange

EVENT = "data: "
MAX_ERROR_CHARACTERS = 300


@dataclass(frozen=True, slots=True)
class Target:
    """A server of completions, and the model's name there."""

    client: httpx.AsyncClient
    url: str
    model: str
    api_key: str | None = None


class Failed(Exception):
    """The server refused the request, or ended it with an error."""


async def complete(
    target: Target, prompt: list[int], answer_tokens: int, exchange: Exchange, on_first_token: Callable[[], None]
) -> None:
    """Generate one answer and record in `exchange` when its tokens arrive; a failure is recorded, not raised."""
    body = {
        "model": target.model,
        "prompt": prompt,
        "max_tokens": answer_tokens,
        # The measurement chooses the length. No `seed`: with it, vLLM's engine dies on CPU.
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    try:
        await _stream(target, body, exchange, on_first_token)
    except Failed as error:
        exchange.failure = str(error)
    except httpx.HTTPError as error:
        exchange.failure = str(error) or type(error).__name__
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        exchange.failure = f"the stream is not vLLM's: {error!r}"[:MAX_ERROR_CHARACTERS]
    exchange.ended_seconds = time.monotonic()


async def _stream(target: Target, body: dict[str, Any], exchange: Exchange, on_first_token: Callable[[], None]) -> None:
    headers = {"authorization": f"Bearer {target.api_key}"} if target.api_key else {}
    url = f"{root_of(target.url)}/v1/completions"
    async with target.client.stream("POST", url, json=body, headers=headers) as reply:
        if reply.status_code != httpx.codes.OK:
            raise Failed(f"{reply.status_code}: {_error_text(await reply.aread())}")
        async for line in reply.aiter_lines():
            if line.startswith(EVENT) and line != f"{EVENT}[DONE]":
                _record(json.loads(line.removeprefix(EVENT)), exchange, on_first_token)
    if not exchange.chunks:
        raise Failed("the stream ended without a token")


def _record(event: dict[str, Any], exchange: Exchange, on_first_token: Callable[[], None]) -> None:
    if "error" in event:
        raise Failed(_message(event["error"]))
    usage = event.get("usage")
    tokens = usage["completion_tokens"] if usage else None
    if not event["choices"]:
        # The last event has no text; its usage is that of the whole answer.
        exchange.total_tokens = tokens
        exchange.prompt_tokens = usage["prompt_tokens"] if usage else exchange.prompt_tokens
    elif tokens != 0:
        exchange.chunks.append(Chunk(time.monotonic(), tokens))
        if len(exchange.chunks) == 1:
            on_first_token()


def _error_text(body: bytes) -> str:
    try:
        return _message(json.loads(body)["error"])
    except (ValueError, LookupError, TypeError):
        return body.decode(errors="replace").strip()[:MAX_ERROR_CHARACTERS] or "no reason given"


def _message(error: Any) -> str:
    text = error.get("message", "") if isinstance(error, dict) else error
    return " ".join(str(text).split())[:MAX_ERROR_CHARACTERS]
