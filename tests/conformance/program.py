"""Run in a process of its own, with the SDK under test on its path: reads calls from stdin, prints what came of each.

`{"url": ..., "calls": [{"sdk": "openai", "call": "chat", "key": ..., "retries": 0, "sync": true, "arguments": {...}}]}`
"""

import asyncio
import importlib
import json
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

PATIENCE_SECONDS = 20
OPENAI: Mapping[str, Callable[[Any], Any]] = {
    "chat": lambda client: client.chat.completions.create,
    "text": lambda client: client.completions.create,
    "embeddings": lambda client: client.embeddings.create,
    "responses": lambda client: client.responses.create,
    "models.retrieve": lambda client: client.models.retrieve,
    "models.list": lambda client: client.models.list,
    "post": lambda client: client.post,
}
ANTHROPIC: Mapping[str, Callable[[Any], Any]] = {
    "messages": lambda client: client.messages.create,
    "count_tokens": lambda client: client.messages.count_tokens,
}


async def main() -> None:
    """Make all calls at once, in the order of the results."""
    job = json.load(sys.stdin)
    print(json.dumps(await asyncio.gather(*(made(job["url"], call) for call in job["calls"]))))


async def made(url: str, call: Mapping[str, Any]) -> dict[str, Any]:
    """Make one call, and say what an application would have seen of it."""
    seen: dict[str, Any] = {"items": []}
    try:
        if call["sdk"] in FRAMEWORKS:
            await FRAMEWORKS[call["sdk"]](url, call, seen)
        elif call.get("sync"):
            await asyncio.to_thread(ask_in_thread, url, call, seen)
        else:
            await ask(url, call, seen)
    except Exception as error:  # noqa: BLE001 - whatever an application would have to catch is what is looked for
        seen["error"] = told(error)
    return seen


async def ask(url: str, call: Mapping[str, Any], seen: dict[str, Any]) -> None:
    """Call asynchronously."""
    async with client_of(url, call, "Async") as client:
        answer = await function_of(call, client)(**arguments_of(call))
        if call["arguments"].get("stream"):
            async for each in answer:
                seen["items"].append(dumped(each))
        else:
            seen["items"].append(dumped(answer))
            seen["request_id"] = getattr(answer, "_request_id", None)


def ask_in_thread(url: str, call: Mapping[str, Any], seen: dict[str, Any]) -> None:
    """Call as most scripts do."""
    with client_of(url, call, "") as client:
        answer = function_of(call, client)(**arguments_of(call))
        if call["arguments"].get("stream"):
            for each in answer:
                seen["items"].append(dumped(each))
        else:
            seen["items"].append(dumped(answer))
            seen["request_id"] = getattr(answer, "_request_id", None)


def client_of(url: str, call: Mapping[str, Any], kind: str) -> Any:
    """Make a client as an application makes it."""
    sdk = importlib.import_module(call["sdk"])
    named = {"openai": "OpenAI", "anthropic": "Anthropic"}[call["sdk"]]
    base = f"{url}/v1" if call["sdk"] == "openai" else url
    made_with = {"base_url": base, "max_retries": call.get("retries", 0), "timeout": PATIENCE_SECONDS}
    return getattr(sdk, kind + named)(api_key=call.get("key", "any"), **made_with)


def function_of(call: Mapping[str, Any], client: Any) -> Any:
    """Find what is called."""
    return (OPENAI if call["sdk"] == "openai" else ANTHROPIC)[call["call"]](client)


def arguments_of(call: Mapping[str, Any]) -> dict[str, Any]:
    """Give what it is called with."""
    return {**call["arguments"], **({"cast_to": object} if call["call"] == "post" else {})}


def dumped(answer: Any) -> Any:
    """Turn into JSON what the SDK made of JSON."""
    return answer.model_dump(mode="json") if hasattr(answer, "model_dump") else answer


def told(error: Exception) -> dict[str, Any]:
    """Say what an application can read from an exception."""
    response = getattr(error, "response", None)
    headers = dict(response.headers) if response is not None else {}
    count = response.request.headers.get("x-stainless-retry-count", "0") if response is not None else "0"
    named = ("status_code", "code", "type", "param", "request_id")
    read = {name: getattr(error, name, None) for name in named}
    return {"class": type(error).__name__, "text": str(error), "retries": int(count), "headers": headers, **read}


# Frameworks: each makes a client as its documentation does, asks once, and once for a stream.


async def langchain(url: str, call: Mapping[str, Any], seen: dict[str, Any]) -> None:
    """ChatOpenAI and OpenAIEmbeddings."""
    from langchain_openai import ChatOpenAI, OpenAIEmbeddings  # noqa: PLC0415

    chat = ChatOpenAI(model=call["model"], base_url=f"{url}/v1", api_key="any", max_retries=0)
    answer = await chat.ainvoke("hello there")
    streamed: list[str] = [str(each.content) async for each in chat.astream("hello there")]
    vectors = OpenAIEmbeddings(
        model=call["model"], base_url=f"{url}/v1", api_key="any", check_embedding_ctx_length=False
    )
    seen["items"] += [answer.content, "".join(streamed), await vectors.aembed_documents(["ab", "c"])]
    seen["usage"] = answer.usage_metadata


async def llama_index(url: str, call: Mapping[str, Any], seen: dict[str, Any]) -> None:
    """OpenAILike, which isn't OpenAI."""
    from llama_index.core.llms import ChatMessage  # noqa: PLC0415
    from llama_index.llms.openai_like import OpenAILike  # noqa: PLC0415

    model = OpenAILike(model=call["model"], api_base=f"{url}/v1", api_key="any", is_chat_model=True)
    messages = [ChatMessage(role="user", content="hello there")]
    answer = await model.achat(messages)
    stream: AsyncIterator[Any] = await model.astream_chat(messages)
    seen["items"] += [answer.message.content, "".join([each.delta or "" async for each in stream])]


FRAMEWORKS = {"langchain": langchain, "llama-index": llama_index}

if __name__ == "__main__":
    asyncio.run(main())
