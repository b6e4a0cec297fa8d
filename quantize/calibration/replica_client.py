"""Answers from a running replica: an OpenAI-compatible address, several requests at once."""

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from quantize.calibration.records import Message
from quantize.errors import RecipeError

_TIMEOUT_SECONDS = 3600.0
_CONNECT_SECONDS = 10.0
_PAUSE_SECONDS = 2.0
# Full, not broken: worth asking again.
_BUSY = frozenset({429, 502, 503, 504})


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt for the base, with the seed of its answer; `tools` is the JSON text of the functions that it offers."""

    messages: tuple[Message, ...]
    seed: int
    tools: str = ""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How answers are drawn: at most `new_tokens` tokens, at a temperature, from the whole vocabulary.

    The default lies between what reasoning models are served with (0.6) and their own distribution (1.0).
    """

    new_tokens: int
    temperature: float = 0.8


@dataclass(frozen=True, slots=True)
class Answer:
    """What a base answered, raw, with its reasoning; not `finished` where the limit cut it."""

    completion: str
    finished: bool


@dataclass(slots=True)
class Replica:
    """One server that serves the base; asks at most `concurrency` questions at a time, each up to `tries` times."""

    url: str
    concurrency: int = 32
    tries: int = 5
    pause_seconds: float = _PAUSE_SECONDS

    def answers(
        self, questions: Sequence[Question], sampling: Sampling, on_progress: Callable[[int, int], None]
    ) -> list[Answer]:
        """Answer all questions, in their order; RecipeError where the server can't."""
        try:
            return asyncio.run(self._answer_all(questions, sampling, on_progress))
        except httpx.HTTPStatusError as error:
            problem = f"{error.response.status_code} {error.response.text[:200]}"
            raise RecipeError(f"{self.url}: refused to answer: {' '.join(problem.split())}") from None
        except httpx.HTTPError as error:
            said = str(error) or type(error).__name__
            raise RecipeError(f"{self.url}: can't be asked: {said}; is the replica running?") from None
        except (ValueError, LookupError, TypeError) as error:
            raise RecipeError(f"{self.url}: is no OpenAI-compatible server: {type(error).__name__}: {error}") from None

    async def _answer_all(
        self, questions: Sequence[Question], sampling: Sampling, on_progress: Callable[[int, int], None]
    ) -> list[Answer]:
        root = self.url.rstrip("/").removesuffix("/v1")
        timeout = httpx.Timeout(_TIMEOUT_SECONDS, connect=_CONNECT_SECONDS)
        limits = httpx.Limits(max_connections=self.concurrency)
        done = 0
        free = asyncio.Semaphore(self.concurrency)
        async with httpx.AsyncClient(base_url=root, timeout=timeout, limits=limits, trust_env=False) as client:
            models = (await client.get("/v1/models")).raise_for_status().json()["data"]

            async def answer(question: Question) -> Answer:
                nonlocal done
                async with free:
                    got = await self._ask(client, request_body(models[0]["id"], question, sampling))
                done += 1
                on_progress(done, len(questions))
                return answer_of(got)

            try:
                async with asyncio.TaskGroup() as group:
                    asked = [group.create_task(answer(question)) for question in questions]
            except ExceptionGroup as failed:
                raise failed.exceptions[0] from None
        return [task.result() for task in asked]

    async def _ask(self, client: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
        for attempt in range(1, self.tries + 1):
            response = await client.post("/v1/chat/completions", json=body)
            if response.status_code not in _BUSY or attempt == self.tries:
                break
            await asyncio.sleep(attempt * self.pause_seconds)
        got: dict[str, Any] = response.raise_for_status().json()
        return got


def request_body(model: str, question: Question, sampling: Sampling) -> dict[str, Any]:
    """Write down what one question asks of the server."""
    # vLLM still renders the tools with "none", and leaves a call in the content, as the model wrote it.
    tools = {"tools": json.loads(question.tools), "tool_choice": "none"} if question.tools else {}
    return {
        "model": model,
        "messages": [turn.to_request() for turn in question.messages],
        **tools,
        "max_tokens": sampling.new_tokens,
        "temperature": sampling.temperature,
        "top_p": 1.0,
        "seed": question.seed,
    }


def answer_of(body: dict[str, Any]) -> Answer:
    """Read a chat completion; reasoning that the server took out of the content goes back in front of it."""
    choice = body["choices"][0]
    message = choice["message"]
    content = message.get("content") or ""
    reasoning = message.get("reasoning") or message.get("reasoning_content") or ""
    finished = choice.get("finish_reason") != "length"
    if not reasoning or "</think>" in content:
        return Answer(content, finished)
    if not content and not finished:
        return Answer(f"<think>\n{reasoning.strip()}", finished=False)
    return Answer(f"<think>\n{reasoning.strip()}\n</think>\n\n{content.lstrip()}", finished)
