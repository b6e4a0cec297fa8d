"""Chat requests to the gateway through the OpenAI SDK, as an application sends them."""

import time
from collections.abc import Callable

from openai import AsyncOpenAI, AsyncStream
from openai.types.chat import ChatCompletionChunk

from gateway.demo.report import Answer

QUESTION = "Explain in two sentences why the sky is blue."
MAX_TOKENS = 64


async def ask(client: AsyncOpenAI, model: str) -> Answer:
    """Send the question without streaming."""
    response = await client.chat.completions.with_raw_response.create(
        model=model, messages=[{"role": "user", "content": QUESTION}], max_tokens=MAX_TOKENS, temperature=0
    )
    completion = response.parse()
    return Answer(completion.choices[0].message.content or "", _gateway_headers(dict(response.headers)), None)


async def ask_streaming(client: AsyncOpenAI, model: str, show: Callable[[str], None]) -> Answer:
    """Send the question with streaming; `show` gets each piece of text. The decode speed is measured."""
    response = await client.chat.completions.with_raw_response.create(
        model=model,
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=MAX_TOKENS,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    stream: AsyncStream[ChatCompletionChunk] = response.parse()
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
    return Answer("".join(parts), _gateway_headers(dict(response.headers)), speed)


def _gateway_headers(headers: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.startswith("x-quantgate-") or name == "x-request-id"}
