"""Ask the gateway through the openai SDK, as an application would."""

import time
from collections.abc import Callable

from openai import AsyncOpenAI, AsyncStream
from openai.types.chat import ChatCompletionChunk

from gateway.demo.report import Answer

QUESTION = "Explain in two sentences why the sky is blue."
MEASURED_TOKENS = 64


async def ask(client: AsyncOpenAI, model: str) -> Answer:
    """Ask without streaming."""
    reply = await client.chat.completions.with_raw_response.create(
        model=model, messages=[{"role": "user", "content": QUESTION}], max_tokens=MEASURED_TOKENS, temperature=0
    )
    completion = reply.parse()
    return Answer(completion.choices[0].message.content or "", _own(dict(reply.headers)), None)


async def ask_streaming(client: AsyncOpenAI, model: str, show: Callable[[str], None]) -> Answer:
    """Ask with streaming; `show` gets the text as it comes. Its speed is measured."""
    reply = await client.chat.completions.with_raw_response.create(
        model=model,
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=MEASURED_TOKENS,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    stream: AsyncStream[ChatCompletionChunk] = reply.parse()
    parts: list[str] = []
    first_at = last_at = 0.0
    tokens = 0
    async for chunk in stream:
        if chunk.usage is not None:
            tokens = chunk.usage.completion_tokens
        for choice in chunk.choices:
            if choice.delta.content:
                last_at = time.monotonic()
                first_at = first_at or last_at
                parts.append(choice.delta.content)
                show(choice.delta.content)
    speed = (tokens - 1) / (last_at - first_at) if last_at > first_at else None
    return Answer("".join(parts), _own(dict(reply.headers)), speed)


def _own(headers: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.startswith("x-quantgate-") or name == "x-request-id"}
